"""A weightless graph and a weight file -> TensorRT's network. Imported by the builder's process alone.

`trt` is the module of either library throughout.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.engines.tensorrt.layout import GRAPH
from toolchain.errors import EngineError
from toolchain.weights.mapped import MappedWeights

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

WEIGHTS = "weights.safetensors"


def create_network(trt: Any, builder: Any) -> Any:
    """A strongly typed network: TensorRT 10 needs the flag, 11 knows no other kind."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def parse(
    trt: Any, network: Any, model: ir.Model, graph: Path, file: Path, weights: MappedWeights, scratch: Path, logger: Any
) -> list[Any]:
    """Parses `model`, which was read from `graph`, with the weights of `file`, opened as `weights`.

    Returns what must live until the engine is built. EngineError, WeightsError.
    """
    parser = trt.OnnxParser(network, logger)
    buffers = hand_over(parser, model, graph, weights)
    if buffers is not None:
        parsed = parser.parse_model_proto()
    else:
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse_from_file(str(_beside_weights(model, file, weights, scratch)))
    if not parsed:
        raise _parse_error(trt, parser, graph)
    return [parser, buffers]


def hand_over(parser: Any, model: ir.Model, graph: Path, weights: MappedWeights) -> list[NDArray[Any]] | None:
    """Gives the parser pointers to the mapped weights and returns the arrays behind them; None where it takes none."""
    import numpy as np

    if not hasattr(parser, "load_initializer") or not parser.load_model_proto(graph.read_bytes()):
        return None
    buffers = []
    for name in weight_names(model):
        buffers.append(np.require(weights.array(name), requirements=["C", "ALIGNED"]))
        if not parser.load_initializer(name, buffers[-1].ctypes.data, buffers[-1].nbytes):
            return None
    return buffers


def weight_names(model: ir.Model) -> list[str]:
    """Names of the initializers that a weight file holds, sorted."""
    from toolchain.graph.placeholder import is_weight

    return sorted(str(name) for name, value in model.graph.initializers.items() if is_weight(value))


def _beside_weights(model: ir.Model, file: Path, weights: MappedWeights, scratch: Path) -> Path:
    """The graph as a file whose external data are a copy of the weight file: paths may not leave the graph's folder."""
    import onnx_ir as ir

    from toolchain.weights.external import attach_weights

    shutil.copyfile(file, scratch / WEIGHTS)
    whole = model.clone()
    attach_weights(whole, weights.refs, WEIGHTS)
    ir.save(whole, scratch / GRAPH)
    return scratch / GRAPH


def _parse_error(trt: Any, parser: Any, graph: Path) -> EngineError:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
    unsupported = any("UNSUPPORTED" in str(e.code()) for e in errors)
    return EngineError(
        "TensorRT does not support an operator of the graph" if unsupported else "TensorRT cannot read the graph",
        where=graph,
        got="\n    ".join(dict.fromkeys(lines)) or "no reason given",
        hint=f"this is TensorRT {trt.__version__}; a newer version may know it",
    )


def decompose_attention(trt: Any, network: Any) -> None:
    """Lets TensorRT take attention apart where no fused kernel fits, rather than fail (NVIDIA/TensorRT issue 4705)."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def add_profiles(builder: Any, config: Any, model: ir.Model) -> None:
    """A profile for each bucket of a graph with dynamic shapes, at that bucket's shapes alone."""
    from toolchain.graph.profiles import read_profiles

    for number, shapes in enumerate(read_profiles(model)):
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        if number:
            profile.extra_memory_target = 0.0  # no weights in another layout beside those of the first
        if config.add_optimization_profile(profile) < 0:
            raise EngineError("TensorRT does not take the shapes of a bucket", got=shapes)
