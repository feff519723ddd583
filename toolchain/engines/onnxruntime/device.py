"""What ONNX Runtime's engines for the CPU at hand are tied to."""

from __future__ import annotations

from typing import Any

from toolchain.engines.cpu import cpu_architecture, cpu_features, cpu_flags
from toolchain.engines.onnxruntime.package import module_version


def saturates_int8() -> bool:
    """Whether sums of two products of uint8 and int8 are cut off at sixteen bits, as on x86 without VNNI."""
    return cpu_architecture() == "x86_64" and not cpu_flags() & {"avx512_vnni", "avx_vnni"}


def cpu_device() -> dict[str, Any]:
    """What engines for this CPU are tied to. Raises EngineError where ONNX Runtime is not installed."""
    return {"kind": "cpu", "cpu": cpu_features(), "onnxruntime": module_version()}
