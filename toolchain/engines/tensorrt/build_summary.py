"""What was built: activation memory, precision and kinds of layers of a plan. Imported by the builder's process alone.

TensorRT's inspector tells it of an engine that is opened, which needs the GPU. Where there is none, the builder's log
does: with detailed profiling its last message holds the same description of every layer, as text.
"""

from __future__ import annotations

import json
import mmap
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.engines.layers import Layer, asked_dtypes, compare_precision, count_layers, require_precision
from toolchain.engines.tensorrt.build_monitor import Say
from toolchain.engines.tensorrt.inspector import read_layers, read_log
from toolchain.engines.tensorrt.library import Library
from toolchain.errors import EngineError

if TYPE_CHECKING:
    import onnx_ir as ir

ATTENTION = re.compile(r"_mha|_fmha|fused_?attention", re.IGNORECASE)
"""What the name of a layer says that is a whole attention in one kernel."""


def report(library: Library, model: ir.Model, plan: Path, logger: Any, graph: Path, say: Say) -> dict[str, Any]:
    """What engine.json says of a plan. EngineError where it cannot be opened, or computes in other types than its graph
    asked for."""
    if library.portable:
        activation_bytes, layers = _of_the_log(logger, graph)
    else:
        activation_bytes, layers = _of_the_engine(library.module(), model, plan, logger, graph, say)
    precision = compare_precision(asked_dtypes(model), layers)
    require_precision(precision, graph, "TensorRT")
    if precision.asked and (not precision.named or precision.opaque):
        say({"warning": "TensorRT's inspector tells no types of the graph's nodes; the precision is not verified"})
    counts = count_layers(layers, sum(bool(ATTENTION.search(layer.name)) for layer in layers))
    return {"activation_bytes": activation_bytes, "precision": precision.to_json(), "layers": counts}


def _of_the_log(logger: Any, graph: Path) -> tuple[int, list[Layer]]:
    if logger.activation_bytes is None:
        raise EngineError("the builder does not tell how much memory the engine's activations take", where=graph)
    return logger.activation_bytes, [layer for text in logger.layers for layer in read_log(text)]


def _of_the_engine(
    trt: Any, model: ir.Model, plan: Path, logger: Any, graph: Path, say: Say
) -> tuple[int, list[Layer]]:
    runtime = trt.Runtime(logger)
    with plan.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        engine = runtime.deserialize_cuda_engine(data)
    if engine is None:
        raise EngineError("TensorRT cannot open the engine that it built", where=graph)
    try:
        descriptions = [json.loads(text, strict=False) for text in _descriptions(trt, engine, model)]
        layers = [layer for description in descriptions for layer in read_layers(description)]
    except (ValueError, RuntimeError) as error:  # an engine is worth more than its description
        say({"warning": f"TensorRT's inspector cannot be asked, or what it says is not JSON ({error})"})
        layers = []
    return int(engine.device_memory_size_v2), layers


def _descriptions(trt: Any, engine: Any, model: ir.Model) -> Iterator[str]:
    """The inspector's words, profile by profile: of a dynamic shape it tells the type once a context has fixed it."""
    from toolchain.graph.profiles import read_profiles

    inspector = engine.create_engine_inspector()
    for number, shapes in enumerate(read_profiles(model) or [{}]):
        if shapes:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None or not context.set_optimization_profile_async(number, 0):
                raise ValueError(f"it has no context for profile {number}")
            if not all(context.set_input_shape(name, shape) for name, shape in shapes.items()):
                raise ValueError(f"it does not take the shapes of profile {number}")
            inspector.execution_context = context
        yield inspector.get_engine_information(trt.LayerInformationFormat.JSON)
