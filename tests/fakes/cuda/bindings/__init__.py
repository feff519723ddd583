"""A stand-in for cuda-bindings: see `runtime`."""

__version__ = "13.0.0"
