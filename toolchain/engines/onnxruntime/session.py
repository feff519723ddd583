"""Sessions of ONNX Runtime, as building and running open them, and the files of an engine.

onnxruntime is imported when a session is opened: `diffbuild doctor` must be able to say that it is missing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from toolchain.errors import EngineError, first_line

GRAPH = "graph.onnx"
WEIGHTS = "weights.safetensors"
PACKED = "packed.safetensors"
FILES = {"weights": WEIGHTS, "packed": PACKED}
"""File name of each role of weight file; they lie side by side when an engine is opened."""
CPU_PROVIDER = "CPUExecutionProvider"
Provider = str | tuple[str, dict[str, str]]
"""The name of an execution provider, alone or with its options."""


def session_options(threads: int, entries: Mapping[str, str] | None = None) -> Any:
    """New `SessionOptions` for so many threads. `entries` are config entries by their names in ONNX Runtime."""
    import onnxruntime

    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in (entries or {}).items():
        settings.add_session_config_entry(name, value)
    return settings


QUANTIZED_FUSIONS = ("QDQSelectorActionTransformer", "QDQPropagationTransformer")
"""Optimisers of ONNX Runtime. The first would make MatMulNBits of int8 weights: a second copy of them, and activations
rounded to int8 (1.32: an error of 5e-3 where a DequantizeLinear leaves 6e-7). The second puts pairs in front of what it
moves a QuantizeLinear over, for the first to take away again. Products of int8 are fused in `integer_kernels`."""


def open_session(graph: bytes, settings: Any, where: Path, providers: Sequence[Provider]) -> Any:
    """A session over a serialised graph; `where` is named in errors.

    Raises EngineError for a graph that ONNX Runtime does not take, and where it cannot use the first provider.
    """
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(
            graph, settings, providers=list(providers), disabled_optimizers=[*QUANTIZED_FUSIONS]
        )
    except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived straight from Exception
        raise EngineError("ONNX Runtime cannot open the graph", where=where, got=first_line(error)) from error
    wanted = [p if isinstance(p, str) else p[0] for p in providers]
    if session.get_providers()[0] != wanted[0]:  # it only warns of one whose libraries cannot be loaded
        got = ", ".join(session.get_providers())
        raise EngineError("ONNX Runtime cannot use an execution provider", where=where, expected=wanted[0], got=got)
    return session
