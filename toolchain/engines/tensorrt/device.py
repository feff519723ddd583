"""The GPU at hand, as engines of TensorRT and of TensorRT for RTX know it."""

from __future__ import annotations

from typing import Any

from toolchain.cuda.driver import available, device_facts
from toolchain.engines.tensorrt.library import Library
from toolchain.errors import EngineError

DOCTOR = "diffbuild doctor"


def gpu_device(library: Library) -> dict[str, Any]:
    """The GPU and the version of the library. Raises EngineError without either, cuda-python, or a driver that is new
    enough."""
    version = library.version()
    reason = available()
    if reason:
        lacks_package = reason.startswith("cuda-python")
        raise EngineError(reason, hint=library.install if lacks_package else DOCTOR)
    return {"kind": "cuda", **device_facts(), library.backend: version}
