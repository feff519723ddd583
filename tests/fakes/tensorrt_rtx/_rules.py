"""Version, injected failures and the GPU at hand."""

from __future__ import annotations

import os

VERSION = os.environ.get("FAKE_TENSORRT_RTX_VERSION") or "1.7.1.116"
FAILURES = ("not_capturable", "suboptimal", "cache_refused")


def failing(name: str) -> bool:
    assert name in FAILURES
    return name in os.environ.get("FAKE_TENSORRT_RTX_FAIL", "").split(",")


def capability() -> str:
    """Of the pretended GPU, such as "8.9"."""
    from cuda.bindings import runtime

    _, found = runtime.cudaGetDeviceProperties(0)
    return f"{found.major}.{found.minor}"
