"""Other programs that run Qwen2-VL, measured beside ours: one module each, each in an environment of its own."""
