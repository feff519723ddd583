"""Graphs as ONNX Runtime optimises them for a device, saved without the weights that lie in weight files.

Building optimises once, so that opening does no graph work. The saved graph holds no weights: its initializers point
into the component's weight files, which ONNX Runtime maps into memory, so that all buckets and all processes share
their pages. What little a bucket has for itself stays in its graph.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolchain.engines.onnxruntime.session import FILES, Provider, open_session
from toolchain.weights.mapped import MappedWeights, TensorRef

if TYPE_CHECKING:
    import onnx_ir as ir

LEVELS = {"basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}
Content = tuple[int, int, bytes]


@contextmanager
def optimized(
    graph: Path, weights: Path, out: Path, level: str, settings: Any, providers: Sequence[Provider]
) -> Iterator[ir.Model]:
    """ONNX Runtime's optimised form of a graph, its initializers in a scratch file below `out` while in use.

    level     the option `optimization`
    settings  new session options, which are changed

    Raises EngineError and WeightsError.
    """
    import onnx_ir as ir
    import onnxruntime

    from toolchain.engines.onnxruntime.integer_kernels import fuse_integer_products
    from toolchain.graph.attention import fuse_attention

    with tempfile.TemporaryDirectory(dir=out) as scratch, MappedWeights(weights) as mapped:
        saved = Path(scratch) / "optimized.onnx"
        settings.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, LEVELS[level])
        settings.optimized_model_filepath = str(saved)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.bin")
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "0")
        model = ir.load(graph)
        settings.add_external_initializers(*_weight_values(model, mapped))
        if level != "basic":
            model = fuse_integer_products(fuse_attention(model))
        open_session(ir.to_proto(model).SerializeToString(), settings, graph, providers)
        yield ir.load(saved)


def _weight_values(model: ir.Model, weights: MappedWeights) -> tuple[list[str], list[Any]]:
    """Names of the weights of a graph, and each as an `OrtValue` over the mapped file."""
    import onnxruntime

    from toolchain.graph.placeholder import is_weight
    from toolchain.weights.derived import SAFETENSORS_DTYPES

    element_types = {name: int(dtype) for dtype, name in SAFETENSORS_DTYPES.items()}
    names = [str(name) for name, value in model.graph.initializers.items() if is_weight(value)]
    kinds = [element_types[weights.refs[name].dtype] for name in names]
    make = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type
    return names, [make(weights.array(name), kind) for name, kind in zip(names, kinds, strict=True)]


def save_engine(model: ir.Model, weights: Mapping[str, Path], path: Path) -> None:
    """Saves an optimised graph whose initializers point into the weight files, where these hold the same bytes.

    weights: role -> file. Raises WeightsError.
    """
    import onnx_ir as ir

    from toolchain.engines.onnxruntime.order import gather_early
    from toolchain.weights.external import point_into

    with ExitStack() as stack:
        known = tensors_by_content({role: stack.enter_context(MappedWeights(file)) for role, file in weights.items()})
        for name, tensor in initializers(model):
            match = known.get(content_of(tensor.numpy()))
            value = model.graph.initializers[name]
            if match is None:
                value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
            else:
                role, ref = match
                point_into(value, ref, FILES[role])
        widen_late(model.graph)
        gather_early(model)
        ir.save(model, path)


def widen_late(graph: ir.Graph) -> None:
    """Moves what is computed from weights alone to the front of the list of nodes.

    A session takes of the inputs of a node the one first whose node is the last in the list (`run_order`): listed in
    front of their readers, weights in int8 would be widened long before these can run, and lie there as floats.
    """
    constant: list[ir.Node] = []
    known = {*graph.initializers.values()}
    for node in graph:
        if node.inputs and all(value is None or value in known for value in node.inputs):
            constant.append(node)
            known.update(node.outputs)
    graph.remove(constant)
    if len(graph):
        graph.insert_before(graph[0], constant)
    else:
        graph.extend(constant)


def initializers(model: ir.Model) -> Iterable[tuple[str, ir.TensorProtocol]]:
    """Name and content of every initializer of an optimised graph."""
    for name, value in list(model.graph.initializers.items()):
        assert value.const_value is not None
        yield str(name), value.const_value


def tensors_by_content(files: Mapping[str, MappedWeights]) -> dict[Content, tuple[str, TensorRef]]:
    """Role and reference of every tensor of the weight files, by `content_of`."""
    return {content_of(f.array(key)): (role, f.refs[key]) for role, f in files.items() for key in f.refs}


def content_of(array: NDArray[Any]) -> Content:
    """Identifies a tensor by its bytes, whatever its shape: a matrix may be stored as the convolution that it was."""
    data = np.ascontiguousarray(array).reshape(-1).view(np.uint8).data  # hashlib knows no types of ml_dtypes
    return array.size, array.dtype.itemsize, hashlib.sha256(data).digest()
