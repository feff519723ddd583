"""Component -> ONNX graph whose weights are references into the checkpoint."""
