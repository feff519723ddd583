"""The build side of every backend, by name. The entry of each is `build.py` in the folder of that name."""

from __future__ import annotations

from typing import Any

from toolchain.engines.backend import Builder
from toolchain.engines.onnxruntime.build import OnnxRuntimeBuilder
from toolchain.engines.onnxruntime_cuda.build import OnnxRuntimeCudaBuilder
from toolchain.engines.openvino.build import OpenVinoBuilder
from toolchain.engines.tensorrt.build import TensorRtBuilder
from toolchain.engines.tensorrt_rtx.build import TensorRtRtxBuilder
from toolchain.errors import UsageError
from toolchain.recipe.options import BackendOptions

BUILDERS: dict[str, Builder[Any]] = {
    "onnxruntime": OnnxRuntimeBuilder(),
    "onnxruntime_cuda": OnnxRuntimeCudaBuilder(),
    "openvino": OpenVinoBuilder(),
    "tensorrt": TensorRtBuilder(),
    "tensorrt_rtx": TensorRtRtxBuilder(),
}


def builder_of(backend: str) -> Builder[Any]:
    """The builder of a backend. Raises UsageError for an unknown name."""
    if backend not in BUILDERS:
        raise UsageError("unknown backend", expected=" or ".join(BUILDERS), got=backend, hint="diffbuild doctor")
    return BUILDERS[backend]


def usable_dtypes(backend: Builder[Any], options: BackendOptions) -> tuple[str, ...]:
    """Of the types of a backend, those in which the device of these options computes."""
    return tuple(dtype for dtype in backend.dtypes if backend.refuses_dtype(dtype, options) is None)
