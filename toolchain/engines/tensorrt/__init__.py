"""TensorRT and TensorRT for RTX, whose builders one code drives."""
