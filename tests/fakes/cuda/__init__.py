"""A stand-in for cuda-python, put first on the path by tests that need a GPU's behaviour but none of its speed."""
