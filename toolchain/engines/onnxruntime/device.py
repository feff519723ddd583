"""What ONNX Runtime's engines for the CPU at hand are tied to."""

from __future__ import annotations

from typing import Any

from toolchain.engines.cpu import cpu_features
from toolchain.engines.onnxruntime.package import module_version


def cpu_device() -> dict[str, Any]:
    """What engines for this CPU are tied to. Raises EngineError where ONNX Runtime is not installed."""
    return {"kind": "cpu", "cpu": cpu_features(), "onnxruntime": module_version()}
