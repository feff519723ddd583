"""Which backend is the fastest on this machine, and why: for `diffbuild doctor` and `diffbuild init`."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.engines.builders import builder_of, usable_dtypes
from toolchain.engines.cpu import cpu_architecture, cpu_flags
from toolchain.engines.openvino.device import INSTRUCTIONS
from toolchain.engines.runners import runner_of
from toolchain.recipe.options import OpenVinoOptions

BEST_FIRST = ("tensorrt", "tensorrt_rtx", "onnxruntime_cuda")
"""Of those that run on a GPU."""
FLOAT32 = "onnxruntime"
"""Of those that run on a CPU, the faster in float32."""


@dataclass(frozen=True)
class Recommendation:
    """dtype is that of the denoiser, None where it depends on the model. `lacks` is why the backend cannot run here as
    the machine is, or None."""

    backend: str
    dtype: str | None
    reason: str
    lacks: str | None


def best_backend() -> str:
    """The fastest that runs here; ONNX Runtime where none does, which every machine can have."""
    on_cpu = ["openvino", FLOAT32] if _bfloat16() else [FLOAT32, "openvino"]
    return next((name for name in (*BEST_FIRST, *on_cpu) if runner_of(name).available() is None), "onnxruntime")


def recommend(has_gpu: bool) -> Recommendation:
    """The fastest backend that this machine can have, installed or not. `has_gpu`: whether it has an NVIDIA GPU."""
    running = next((name for name in BEST_FIRST if runner_of(name).available() is None), None)
    if running or has_gpu:
        return _recommended(running or BEST_FIRST[0], None, "this machine has an NVIDIA GPU")
    if instruction := _bfloat16():
        reason = f"this CPU computes in bfloat16 ({instruction}), which takes about half as long as float32"
        return _recommended("openvino", "bfloat16", reason)
    return _recommended(FLOAT32, "float32", "this CPU does not compute in bfloat16, and in float32 it is the fastest")


def _recommended(backend: str, dtype: str | None, reason: str) -> Recommendation:
    return Recommendation(backend, dtype, reason, runner_of(backend).available())


def _bfloat16() -> str | None:
    """What makes this CPU compute in bfloat16; None where it does not, or where nobody knows without OpenVINO."""
    listed = next((name for name in INSTRUCTIONS["bfloat16"] if name in cpu_flags()), None)
    if runner_of("openvino").available() is not None:
        return listed
    computes = "bfloat16" in usable_dtypes(builder_of("openvino"), OpenVinoOptions())
    return (listed or cpu_architecture()) if computes else None
