"""Latency and memory, measured side by side."""
