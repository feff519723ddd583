"""What a session of ONNX Runtime on the CPU will keep in memory, computed from its optimised graph at build time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir

from toolchain.graph.liveness import Kind, declared, peak_bytes
from toolchain.graph.placeholder import is_weight, static_shape

Shape = tuple[int, ...]
PACKING = {
    **dict.fromkeys(("MatMul", "Gemm", "FusedMatMul", "FusedGemm"), ir.DataType.FLOAT),
    "MatMulIntegerToFloat": ir.DataType.INT8,
}
"""Products that keep a copy of their weight in the layout of their kernel, and the type of that weight."""
NODE_BYTES = 7680
"""Of a session per node: 1.3 MB more for 162 nodes and 4.1 MB for 552."""
ARENA_TIMES = 2.2
"""In its first run a session allocates tensor by tensor, from then on one block with room for all of them, and the
arena keeps both, the first with holes. 2.0 to 2.3 times the activations for engines with 10 MB of them and more."""
PACKED_COLUMNS = 16  # MLAS_SGEMM_STRIDEN_THREAD_ALIGN: packed columns are filled up to a multiple of it
PACKED_ROWS = 4  # of int8, which are multiplied by fours
BLOCK, NARROW_BLOCK = 16, 8  # channels that lie side by side: a vector of AVX-512, or of less


def memory_facts(model: ir.Model, features: str) -> dict[str, Any]:
    """For `engine.json`; `features` are `cpu_features()`, which decide how wide channels are blocked.

    mapped_bytes      of weights that are read where they are mapped: not the packed ones, whose originals are let go,
                      nor the tables that are only looked up in, of which a few rows are read
    packed_bytes      of the copies that matrix kernels keep of theirs
    session_bytes     of the graph as the session holds it
    activation_bytes  of tensors between the nodes; None where the shape of one is not known
    arena_bytes       of what stays allocated for them
    """
    graph = model.graph
    packed = {name: size for node in graph for name, size in [_packed(node)] if name}
    weights = [v for name, v in graph.initializers.items() if is_weight(v) and name not in packed and not _table(v)]
    kinds = _Kinds(BLOCK if "avx512" in features else NARROW_BLOCK)
    try:
        activations: int | None = peak_bytes(run_order(graph), kinds)
    except LookupError:
        activations = None
    return {
        "mapped_bytes": sum(v.const_value.nbytes for v in weights if v.const_value is not None),
        "packed_bytes": sum(packed.values()),
        "session_bytes": NODE_BYTES * len(graph),
        "activation_bytes": activations,
        "arena_bytes": None if activations is None else int(ARENA_TIMES * activations),
    }


def run_order(graph: ir.Graph) -> list[ir.Node]:
    """The order in which a session runs the nodes: depth first from what the last of them needs (GraphViewer)."""
    index = {node: i for i, node in enumerate(graph)}
    stack = [(node, False) for node in graph if not any(value.uses() for value in node.outputs)]
    seen: set[ir.Node] = set()
    order = []
    while stack:
        node, is_ready = stack.pop()
        if is_ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            sources = {
                source for value in node.inputs if value is not None and (source := value.producer()) is not None
            }
            stack += [(node, True), *((source, False) for source in sorted(sources, key=index.__getitem__))]
    return order


def _table(weight: ir.Value) -> bool:
    return all(node.op_type == "Gather" and position == 0 for node, position in weight.uses())


def _packed(node: ir.Node) -> tuple[str | None, int]:
    """The weight of a product that is packed, and into how many bytes: K rows of N columns, as float32, in int4, or as
    int8 with the sum of every column."""
    if node.op_type == "MatMulNBits" and node.inputs[1] is not None and node.inputs[1].const_value is not None:
        return node.inputs[1].name, node.inputs[1].const_value.nbytes
    weight = node.inputs[1] if node.op_type in PACKING else None
    if weight is None or weight.const_value is None or weight.dtype != PACKING[node.op_type]:
        return None, 0
    shape = static_shape(weight.const_value)
    if len(shape) != 2:
        return None, 0
    rows, columns = shape[::-1] if _integer(node, "transB", 0) else shape
    columns = math.ceil(columns / PACKED_COLUMNS) * PACKED_COLUMNS
    if weight.dtype == ir.DataType.INT8:
        return weight.name, columns * (math.ceil(rows / PACKED_ROWS) * PACKED_ROWS + 4)
    return weight.name, columns * rows * 4


class _Kinds:
    """The shape and dtype of every value. ONNX Runtime does not write down those that its optimiser made.

    LookupError for an operator that is not known here.
    """

    def __init__(self, block: int) -> None:
        self._block = block
        self._known: dict[ir.Value, Kind] = {}

    def __call__(self, value: ir.Value) -> Kind:
        if value not in self._known:
            self._known[value] = self._find(value)
        return self._known[value]

    def _find(self, value: ir.Value) -> Kind:
        node = value.producer()
        try:
            return declared(value)
        except LookupError:
            if node is None or node.op_type not in RULES:
                raise
        inputs = [self(v) for v in node.inputs if v is not None]
        dtype = (
            ir.DataType(_integer(node, "to", 1)) if node.op_type == "Cast" else inputs[TYPED.get(node.op_type, 0)][1]
        )
        return RULES[node.op_type](node, [shape for shape, _ in inputs], self._block), dtype


def _reorder(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    """NCHW, or NHWC with channels_last, to blocked channels, of which the last block is filled up."""
    shape = inputs[0]
    batch, *rest = shape
    channels, sides = (rest[-1], rest[:-1]) if _integer(node, "channels_last", 0) else (rest[0], rest[1:])
    return (batch, math.ceil(channels / block) * block, *sides)


def _conv(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    source, weight = inputs[:2]
    sides = len(source) - 2
    strides, dilations = (_integers(node, name, [1] * sides) for name in ("strides", "dilations"))
    pads = _integers(node, "pads", [0] * 2 * sides)
    extents = [d * (k - 1) + 1 for d, k in zip(dilations, weight[2:], strict=True)]
    padded = [s + pads[i] + pads[i + sides] for i, s in enumerate(source[2:])]
    sizes = [(p - e) // s + 1 for p, e, s in zip(padded, extents, strides, strict=True)]
    return (source[0], weight[0], *sizes)


def _upsample(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    return tuple(s * k for s, k in zip(inputs[0], _integers(node, "scales", [1] * 4), strict=True))


def _matmul(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    first, second = inputs[:2]
    rows = first[-1] if _integer(node, "transA", 0) else first[-2]
    columns = second[-2] if _integer(node, "transB", 0) else second[-1]
    return (*np.broadcast_shapes(first[:-2], second[:-2]), rows, columns)


def _gather(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    source, indices = inputs
    axis = _integer(node, "axis", 0)
    return (*source[:axis], *indices, *source[axis + 1 :])


def _attention(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    """Query [B, S, H]; values [B, L, Hv], or [B, heads, L, Hv / heads]."""
    query, values = inputs[0], inputs[2]
    return (*query[:2], values[-1] * (values[1] if len(values) == 4 else 1))


def _restore(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    """Blocked channels to NCHW, or to NHWC with channels_last."""
    batch, _, *sides = inputs[0]
    channels = _integer(node, "channels", 0)
    return (batch, *sides, channels) if _integer(node, "channels_last", 0) else (batch, channels, *sides)


def _gemm(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    rows = inputs[0][1 if _integer(node, "transA", 0) else 0]
    return rows, inputs[1][0 if _integer(node, "transB", 0) else 1]


def _reshape(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    wanted = [inputs[0][i] if n == 0 else n for i, n in enumerate(_constant(node, 1))]
    rest = math.prod(n for n in wanted if n != -1)
    return tuple(math.prod(inputs[0]) // rest if n == -1 else n for n in wanted)


def _concat(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    axis = _integer(node, "axis", 0)
    shape = list(inputs[0])
    shape[axis] = sum(one[axis] for one in inputs)
    return tuple(shape)


def _elementwise(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    return np.broadcast_shapes(*inputs)


def _reduce(node: ir.Node, inputs: list[Shape], block: int) -> Shape:
    given = node.attributes.get("axes")
    axes = {axis % len(inputs[0]) for axis in (_constant(node, 1) if given is None else given.as_ints())}
    kept = _integer(node, "keepdims", 1)
    return tuple(1 if i in axes else n for i, n in enumerate(inputs[0]) if kept or i not in axes)


RULES = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Reciprocal"), _elementwise),
    **dict.fromkeys(
        ("Cast", "Erf", "Exp", "Neg", "QuickGelu", "Sigmoid", "Softplus", "Sum", "Tanh", "Where"), _elementwise
    ),
    **dict.fromkeys(
        ("DequantizeLinear", "InstanceNormalization", "LayerNormalization", "QuantizeLinear", "Softmax"),
        lambda node, inputs, block: inputs[0],
    ),
    "Gather": _gather,
    "MultiHeadAttention": _attention,
    **dict.fromkeys(("ReduceL2", "ReduceMax", "ReduceMean", "ReduceSum"), _reduce),
    **dict.fromkeys(("MatMul", "FusedMatMul", "MatMulIntegerToFloat"), _matmul),
    "MatMulNBits": lambda node, inputs, block: (*inputs[0][:-1], _integer(node, "N", 0)),
    "ReorderInput": _reorder,
    "ReorderOutput": _restore,
    "Conv": _conv,
    "Upsample": _upsample,
    "Gemm": _gemm,
    "Reshape": _reshape,
    "Concat": _concat,
}


TYPED = {"Where": 1, "DequantizeLinear": 1, "QuantizeLinear": 2, "MatMulIntegerToFloat": 2}
"""Which input has the result's type, where it is not the first."""


def _constant(node: ir.Node, position: int) -> list[int]:
    """An input of integers that is part of the graph. LookupError where it is not."""
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None or value.const_value is None:
        raise LookupError(f"input {position} of {node.name} is no constant")
    return [int(n) for n in value.const_value.numpy()]


def _integer(node: ir.Node, name: str, default: int) -> int:
    attribute = node.attributes.get(name)
    return default if attribute is None else attribute.as_int()


def _integers(node: ir.Node, name: str, default: list[int]) -> list[int]:
    attribute = node.attributes.get(name)
    return default if attribute is None else list(attribute.as_ints())
