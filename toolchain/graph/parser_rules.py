"""What TensorRT's ONNX parser refuses, found before anything is built: node by node, without TensorRT.

The tables are in `parser_tables`. TensorRT for RTX has a parser of another line: where it was asked and takes more or
less, the rule says so. Numbered as in the tests:

1. An operator that the parser does not have, or not yet in this version of TensorRT.
2. A type that the operator does not take in TensorRT: integers in Clip, uint8 in anything but a Cast.
3. A type that ONNX allows only at a newer opset: bfloat16 convolutions came with opset 22. (onnx's checker refuses such
   a graph; what TensorRT makes of it is not documented, TensorRT for RTX takes it.) What no opset allows, the table
   decides: Einsum in bfloat16, which torch writes and TensorRT lists.
4. float64, which both libraries compute in float32 without saying so.
5. An attribute, output or rank that an operator may not have.
6. An input that must be a constant and is computed.
7. Zero points other than 0, and a DequantizeLinear that makes float32 of what was quantised from float16: it is taken,
   and slow.
8. An opset that the parser does not know. (It reads operators of a newer one by the rules of those it knows.)
9. All of this inside of If, Loop and Scan too; an Attention there, and branches of different ranks.
10. Inputs of several types where ONNX wants one: networks are strongly typed, and nothing is cast for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import onnx_ir as ir
from onnx_ir.passes import common

from toolchain.graph.parser_tables import (
    CONSTANT_INPUTS,
    CONSTANT_INPUTS_RTX,
    CONVERTED,
    DATA_INPUT,
    FLOATS,
    FORBIDDEN_ATTRIBUTES,
    INPUTS_LEFT_OUT,
    KNOWN,
    MAX_TOPK,
    MODES,
    MODES_RTX,
    NONPAD,
    NOT_THERE,
    OLDEST,
    OPSETS,
    OPSETS_RTX,
    OUTPUTS,
    OUTPUTS_TYPED,
    PLUGINS,
    SINCE,
    TAKES,
    TAKES_RTX,
    D,
    Version,
)


def refusals(model: ir.Model, version: Version = OLDEST) -> list[str]:
    """What the parser of a version would refuse of a graph, one line for each node and reason.

    `version` is what either library says of itself: (11, 4) is one of TensorRT, (1, 7, 1) one of TensorRT for RTX.
    Weights may be placeholders without values. An empty list is no promise: kernels are the builder's business.
    """
    opset = model.opset_imports.get("", 0)
    known = OPSETS_RTX if _rtx(version) else OPSETS
    if opset not in known:
        return [f"opset {opset} is not one of {known.start} to {known.stop - 1}"]  # 8
    if any(value.dtype is None for node, _ in _nodes(model.graph) for value in node.outputs):
        model = common.ShapeInferencePass()(model.clone()).model  # of an untyped value nothing can be said
    functions = {(name[0], name[1]) for name in model.functions}
    return [
        f"{node.op_type} {node.name}: {why}"
        for node, nested in _nodes(model.graph)
        if (node.domain, node.op_type) not in functions
        for why in _of_node(node, nested, opset, version)
    ]


def _rtx(version: Version) -> bool:
    """TensorRT for RTX counts from 1, TensorRT was at 10 by then."""
    return version < (10,)


def _has(version: Version, since: Version) -> bool:
    """Whether what came with a TensorRT version is there. TensorRT for RTX has all that is asked for here."""
    return _rtx(version) or version >= since


def _nodes(graph: ir.Graph, nested: bool = False) -> Iterator[tuple[ir.Node, bool]]:
    """Every node, and whether it stands inside of an If, Loop or Scan."""
    for node in graph:
        yield node, nested
        for attribute in node.attributes.values():
            if attribute.type is ir.AttributeType.GRAPH:
                yield from _nodes(attribute.as_graph(), True)


def _of_node(node: ir.Node, nested: bool, opset: int, version: Version) -> Iterator[str]:
    missing = _missing(node, opset, version)
    if missing:
        yield missing
        return
    if nested and node.op_type == "Attention":
        yield "it stands inside of an If or Loop (NVIDIA/TensorRT issue 4739)"  # 9
    yield from _types(node, opset, version)
    yield from _agreement(node, opset, version)
    yield from _attributes(node, version)
    yield from _constants(node, version)
    if node.op_type in SPECIAL:
        yield from SPECIAL[node.op_type](node, version)


def _missing(node: ir.Node, opset: int, version: Version) -> str | None:
    """1"""
    if node.domain not in ("", "ai.onnx"):
        return f"an operator of the domain {node.domain}"
    if _rtx(version) and node.op_type in PLUGINS.split():
        return "it is a plugin, and TensorRT for RTX has none"
    if node.op_type not in _takes(version):
        return "TensorRT has no such operator" if node.op_type in NOT_THERE.split() else "an unknown operator"
    since = SINCE.get(node.op_type)
    if node.op_type == "GroupNormalization" and opset >= 21:
        since = (10, 15)  # NVIDIA/TensorRT issues 4313 and 4336
    if since is not None and not _has(version, since):
        return f"TensorRT has it since {'.'.join(map(str, since))}"
    return None


def _takes(version: Version) -> dict[str, frozenset[ir.DataType]]:
    return TAKES_RTX if _rtx(version) else TAKES


def _types(node: ir.Node, opset: int, version: Version) -> Iterator[str]:
    """2, 3, 4"""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is not None]
    if any(v.dtype is D.DOUBLE for v in values):
        yield "float64 is computed in float32"
        return
    data, taken = _data(node), _takes(version)[node.op_type]
    if taken and data is not None and data not in taken:
        yield f"{_said(data)} is no type that TensorRT's {node.op_type} takes"
    strange = next((v.dtype for v in values if v.dtype not in KNOWN and v.dtype is not data), None)
    if strange is not None:
        yield f"{_said(strange)} is no type of TensorRT"
    for index, value in (*enumerate(node.inputs), *((-1 - i, v) for i, v in enumerate(node.outputs))):
        if value is not None and value.dtype is not None and not _legal(node.op_type, opset, index, value.dtype):
            since = next((v for v in OPSETS if v > opset and _legal(node.op_type, v, index, value.dtype)), None)
            if since is not None and not _rtx(version):
                yield f"{_said(value.dtype)} is no type of it in opset {opset}, only since {since}"
                return


def _agreement(node: ir.Node, opset: int, version: Version) -> Iterator[str]:
    """10"""
    firsts: dict[str, ir.Value] = {}
    for index, value in enumerate(node.inputs):
        if value is None or value.dtype is None:
            continue
        if _rtx(version) and node.op_type in CONVERTED and index and _is_constant(value):
            continue
        first = firsts.setdefault(_variable(node.op_type, opset, index), value)
        if first.dtype is not value.dtype and first.dtype is not None:
            yield (
                f"{first.name} is {_said(first.dtype)} and {value.name} is {_said(value.dtype)}: "
                "they must be of one type, nothing is cast"
            )
            return


@cache
def _variable(op_type: str, opset: int, index: int) -> str:
    """The name of an input's type, which inputs of one type share; the input's index where ONNX ties it to no other."""
    import onnx

    if op_type == "GridSample":
        return "T"  # ONNX lets input and grid differ, TensorRT does not
    formal = onnx.defs.get_schema(op_type, opset).inputs
    parameter = formal[min(index, len(formal) - 1)]
    return str(parameter.type_str) if parameter.is_homogeneous and "(" not in parameter.type_str else str(index)


def _data(node: ir.Node) -> ir.DataType | None:
    """The type that an operator computes in."""
    position = DATA_INPUT.get(node.op_type, 0)
    value = node.inputs[position] if position < len(node.inputs) else None
    if value is None or node.op_type in OUTPUTS_TYPED:
        value = node.outputs[0] if node.outputs else None
    return None if value is None else value.dtype


@cache
def _legal(op_type: str, opset: int, index: int, dtype: ir.DataType) -> bool:
    """Whether ONNX allows a type for an input, or for the output -1 - index."""
    import onnx

    schema = onnx.defs.get_schema(op_type, opset)
    formal = schema.inputs if index >= 0 else schema.outputs
    position = index if index >= 0 else -1 - index
    kinds = formal[min(position, len(formal) - 1)].types
    return not kinds or f"tensor({dtype.name.lower()})" in kinds


def _said(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _attributes(node: ir.Node, version: Version) -> Iterator[str]:
    """5"""
    for name, allowed in (MODES_RTX if _rtx(version) else MODES).get(node.op_type, {}).items():
        if name in node.attributes:
            value = node.attributes[name].value
            values = value if isinstance(value, tuple | list) else (value,)
            if any(v not in allowed for v in values):
                yield f"{name} = {value!r} (expected {' or '.join(map(repr, allowed))})"
    for name in FORBIDDEN_ATTRIBUTES.get(node.op_type, ()):
        if name in node.attributes:
            yield f"the attribute {name} is not supported"
    used = [v for v in node.outputs[OUTPUTS.get(node.op_type, 99) :] if v.uses() or v.is_graph_output()]
    if used:
        yield f"the output {used[0].name} is not supported: only the first is"
    for index in INPUTS_LEFT_OUT.get(node.op_type, ()):
        if _rtx(version) and index == NONPAD:
            continue
        if len(node.inputs) > index and node.inputs[index] is not None:
            yield f"the input {index} is not supported"


def _constants(node: ir.Node, version: Version) -> Iterator[str]:
    """6"""
    for index, name in (CONSTANT_INPUTS_RTX if _rtx(version) else CONSTANT_INPUTS).get(node.op_type, {}).items():
        value = node.inputs[index] if index < len(node.inputs) else None
        if value is not None and not _is_constant(value):
            yield f"{name} is computed, it must be a constant"


def _is_constant(value: ir.Value) -> bool:
    producer = value.producer()
    return value.const_value is not None or (producer is not None and producer.op_type == "Constant")


def _values(value: ir.Value | None) -> list[float] | None:
    """The values of a constant, None where they are not known: for activations and weights without bytes."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    if tensor is None or isinstance(tensor, ir.ExternalTensor):
        return None
    return [float(v) for v in tensor.numpy().ravel().tolist()]


def _rank(value: ir.Value | None) -> int | None:
    return None if value is None or value.shape is None else len(value.shape)


def _attention(node: ir.Node, version: Version) -> Iterator[str]:
    ranks = [_rank(v) for v in node.inputs[:4] if v is not None]
    if not _rtx(version):
        if any(rank not in (None, 4) for rank in ranks):
            yield f"query, key, value and mask must have 4 dimensions, not {ranks}"
        return
    key, value, mask = (*node.inputs[1:4], None, None, None)[:3]
    causal = node.attributes.get("is_causal")
    if mask is not None and causal is not None and causal.as_int():
        yield "is_causal and a mask exclude each other"
    if key is not None and value is not None and None not in (key.shape, value.shape) and key.shape != value.shape:
        yield f"key and value must have one shape, not {key.shape} and {value.shape}"


def _pool(node: ir.Node, version: Version) -> Iterator[str]:
    rank = _rank(node.inputs[0])
    if rank not in (None, 4, 5) and not _rtx(version):
        yield f"only 2-D and 3-D pooling is supported, the input has {rank} dimensions"


def _grid_sample(node: ir.Node, version: Version) -> Iterator[str]:
    rank, most = _rank(node.inputs[0]), 5 if _has(version, (11, 2)) else 4
    if rank is not None and not 4 <= rank <= most:
        yield f"the input has {rank} dimensions (expected 4, from TensorRT 11.2 on also 5)"


def _convolution(node: ir.Node, version: Version) -> Iterator[str]:
    if any(v is not None and v.dtype is D.BFLOAT16 for v in node.inputs):
        yield "no bfloat16 kernel (TensorRT-Incubator issue 565)"


def _mod(node: ir.Node, version: Version) -> Iterator[str]:
    fmod = node.attributes.get("fmod")
    if _data(node) in FLOATS and (fmod is None or not fmod.as_int()):
        yield "fmod = 0 is for integers"


def _resize(node: ir.Node, version: Version) -> Iterator[str]:
    axes, rank = node.attributes.get("axes"), _rank(node.inputs[0])
    by_scales = len(node.inputs) > 2 and node.inputs[2] is not None
    if (
        axes is not None
        and by_scales
        and rank is not None
        and not _rtx(version)
        and list(axes.as_ints()) != list(range(rank))
    ):
        yield f"axes = {list(axes.as_ints())} (expected all {rank}, in order)"


def _top_k(node: ir.Node, version: Version) -> Iterator[str]:
    count = _values(node.inputs[1])
    if count is not None and count[0] >= MAX_TOPK and not _rtx(version):
        yield f"K = {int(count[0])} (expected less than {MAX_TOPK})"


def _static(node: ir.Node, version: Version) -> Iterator[str]:
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    if shape is not None and not shape.is_static():
        yield "the input's dimensions must be known"


def _zero_point(node: ir.Node, version: Version) -> Iterator[str]:
    """7"""
    point = node.inputs[2] if len(node.inputs) > 2 else None
    values = _values(point)
    if point is not None and (values is None or any(values)):
        yield "the zero point must be 0" if values else "the zero point is not known; it must be 0"
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node.op_type == "DequantizeLinear" and source is not None and source.op_type == "QuantizeLinear":
        before, after = source.inputs[0], node.inputs[1]
        if before is not None and after is not None and before.dtype is not after.dtype and after.dtype is D.FLOAT:
            yield "its scale is float32, and so is everything behind it: give it the type that was quantised"


def _branches(node: ir.Node, version: Version) -> Iterator[str]:
    """9"""
    if _rtx(version):
        return
    then, other = node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()
    for a, b in zip(then.outputs, other.outputs, strict=True):
        if a.name == b.name:
            yield f"both branches call their output {a.name}"
        if None not in (_rank(a), _rank(b)) and _rank(a) != _rank(b):
            yield f"the branches give {_rank(a)} and {_rank(b)} dimensions"


def _tensor_scatter(node: ir.Node, version: Version) -> Iterator[str]:
    if any(_rank(v) not in (None, 4) for v in node.inputs[:2]):
        yield "past_cache and update must have 4 dimensions"


SPECIAL: dict[str, Callable[[ir.Node, Version], Iterator[str]]] = {
    "Attention": _attention,
    "AveragePool": _pool,
    "ConvTranspose": _convolution,
    "DequantizeLinear": _zero_point,
    "EyeLike": _static,
    "GridSample": _grid_sample,
    "If": _branches,
    "MaxPool": _pool,
    "Mod": _mod,
    "QuantizeLinear": _zero_point,
    "Resize": _resize,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
}
