"""Number formats and calibration; writes quantized checkpoints."""
