"""From a checkpoint to a bundle: reads safetensors, writes ONNX graphs; needs no torch."""
