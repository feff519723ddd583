"""TensorRT for RTX: engines for whole generations of GPUs, built on any machine and without a GPU."""
