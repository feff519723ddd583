"""The list of backends."""

from __future__ import annotations

from toolchain.engines.backend import Backend
from toolchain.engines.onnxruntime.backend import OnnxRuntimeBackend
from toolchain.engines.onnxruntime_cuda.backend import OnnxRuntimeCudaBackend
from toolchain.engines.tensorrt.backend import TensorRtBackend
from toolchain.engines.tensorrt.rtx_backend import TensorRtRtxBackend
from toolchain.errors import UsageError

BACKENDS: dict[str, Backend] = {
    "onnxruntime": OnnxRuntimeBackend(),
    "onnxruntime_cuda": OnnxRuntimeCudaBackend(),
    "tensorrt": TensorRtBackend(),
    "tensorrt_rtx": TensorRtRtxBackend(),
}


def backend_of(name: str) -> Backend:
    """Raises UsageError for an unknown name."""
    if name not in BACKENDS:
        raise UsageError("unknown backend", expected=" or ".join(BACKENDS), got=name, hint="diffbuild doctor")
    return BACKENDS[name]
