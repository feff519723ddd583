"""ONNX Runtime's CUDA execution provider: its libraries, its sessions' options, and what its engines are tied to."""

from __future__ import annotations

import contextlib
import io
from typing import Any

from toolchain.cuda.driver import device_facts
from toolchain.engines.onnxruntime.package import module_version
from toolchain.engines.onnxruntime.session import session_options

PROVIDER = "CUDAExecutionProvider"


def cuda_device() -> dict[str, Any]:
    """What engines are tied to. Kernels are chosen when an engine is opened: graphs optimised for one GPU run on
    another. Raises EngineError without a GPU or ONNX Runtime."""
    return {"kind": "cuda", "name": device_facts()["name"], "onnxruntime": module_version()}


def cuda_session_options() -> Any:
    """Session options: no work is left for the host, and weights stay out of the arena, which doubles its blocks."""
    return session_options(1, {"session.use_device_allocator_for_initializers": "1"})


def load_libraries() -> None:
    """Lets ONNX Runtime find CUDA's libraries where pip put them. Missing ones are named by the session's error."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()
