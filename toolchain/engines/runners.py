"""The run side of every backend, by name. The entry of each is `run.py` in the folder of that name."""

from __future__ import annotations

from typing import Any

from toolchain.engines.backend import Runner
from toolchain.engines.onnxruntime.run import OnnxRuntimeRunner
from toolchain.engines.onnxruntime_cuda.run import OnnxRuntimeCudaRunner
from toolchain.engines.openvino.run import OpenVinoRunner
from toolchain.engines.tensorrt.run import TensorRtRunner
from toolchain.engines.tensorrt_rtx.run import TensorRtRtxRunner
from toolchain.errors import UsageError

RUNNERS: dict[str, Runner[Any]] = {
    "onnxruntime": OnnxRuntimeRunner(),
    "onnxruntime_cuda": OnnxRuntimeCudaRunner(),
    "openvino": OpenVinoRunner(),
    "tensorrt": TensorRtRunner(),
    "tensorrt_rtx": TensorRtRtxRunner(),
}


def runner_of(backend: str) -> Runner[Any]:
    """The runner of a backend. Raises UsageError for an unknown name."""
    if backend not in RUNNERS:
        raise UsageError("unknown backend", expected=" or ".join(RUNNERS), got=backend, hint="diffbuild doctor")
    return RUNNERS[backend]
