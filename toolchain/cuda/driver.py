"""CUDA through cuda-python: calls with their errors raised, and facts about the GPU.

`cuda.bindings` imports without a driver, so that `available` can say what is missing. One process uses one GPU, the
first that CUDA_VISIBLE_DEVICES leaves.
"""

from __future__ import annotations

import threading
from typing import Any

from toolchain.errors import EngineError

ALLOCATION = threading.RLock()
"""A lock around everything that allocates or frees GPU memory: ONNX Runtime captures graphs in CUDA's global mode, in
which an allocation by any other thread spoils the capture."""

LEAST_DRIVER = 13000
"""CUDA version that the driver must know, as CUDA counts: 1000 * major + 10 * minor. cuda-python 13 needs it."""


def cudart() -> Any:
    """The CUDA runtime's binding."""
    from cuda.bindings import runtime

    return runtime


def call(function: str, *args: Any) -> Any:
    """The value, or the list of values, of a function of the CUDA runtime. EngineError with CUDA's message."""
    code, *values = getattr(cudart(), function)(*args)
    if code:
        raise EngineError("a CUDA call failed", where=function, got=describe(code))
    return values[0] if len(values) == 1 else values


def describe(code: Any) -> str:
    """An error code's name and message."""
    name, text = (getattr(cudart(), f)(code)[1].decode() for f in ("cudaGetErrorName", "cudaGetErrorString"))
    return f"{name}: {text}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


def available() -> str | None:
    """Why no GPU can be used here, or None."""
    try:
        cudart()
    except ImportError as error:
        return f"cuda-python cannot be imported: {error}"
    driver = call("cudaDriverGetVersion")
    if driver == 0:
        return "no NVIDIA driver"
    if driver < LEAST_DRIVER:
        return f"the NVIDIA driver knows CUDA {_version(driver)}, CUDA {_version(LEAST_DRIVER)} or newer is needed"
    try:
        count = call("cudaGetDeviceCount")
    except EngineError as error:
        return f"no NVIDIA GPU can be used: {error.got}"
    return None if count else "no NVIDIA GPU"


def device_facts() -> dict[str, Any]:
    """The GPU and the software below it. EngineError, with what `available` says, without one.

    compute_capability  such as "9.0"
    driver, cuda        the newest CUDA that the driver knows, and the CUDA runtime's version, such as "13.0"
    """
    reason = available()
    if reason:
        raise EngineError("no GPU can be used", got=reason, hint="diffbuild doctor")
    properties = call("cudaGetDeviceProperties", 0)
    return {
        "name": properties.name.rstrip(b"\0").decode(),
        "compute_capability": f"{properties.major}.{properties.minor}",
        "sm_count": int(properties.multiProcessorCount),
        "memory_bytes": int(properties.totalGlobalMem),
        "driver": _version(call("cudaDriverGetVersion")),
        "cuda": _version(call("cudaRuntimeGetVersion")),
    }


def free_memory_bytes() -> int:
    """Free GPU memory. EngineError without a GPU."""
    return int(call("cudaMemGetInfo")[0])
