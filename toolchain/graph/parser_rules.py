"""What TensorRT's ONNX parser refuses, told before anything is built: on a machine without TensorRT, and by node.

The tables are those of onnx-tensorrt's docs/operators.md (TensorRT 10.15; 11.1 adds nothing that an export writes), the
versions beside them those of its changelog and issues. Numbered as in the tests:

1. An operator that the parser does not have, or not yet in this version of TensorRT.
2. A type that the operator does not take in TensorRT: integers in Clip, uint8 in anything but a Cast.
3. A type that ONNX allows only at a newer opset: bfloat16 convolutions came with opset 22. (onnx's checker refuses such
   a graph; what TensorRT makes of it is not documented.) What no opset allows, TensorRT's own table decides: Einsum in
   bfloat16, which torch writes and TensorRT lists.
4. float64, which TensorRT computes in float32 without saying so.
5. An attribute, output or rank that an operator may not have.
6. An input that must be a constant and is computed.
7. Zero points other than 0, and a DequantizeLinear that makes float32 of what was quantised from float16.
8. An opset that the parser does not know.
9. All of this inside of If, Loop and Scan too; an Attention there, and branches of different ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache

import onnx_ir as ir
from onnx_ir.passes import common

OLDEST = (10, 13)
OPSETS = range(9, 25)
Version = tuple[int, ...]
D = ir.DataType

NOT_THERE = """
    AffineGrid Bernoulli BitShift BitwiseAnd BitwiseNot BitwiseOr BitwiseXor CenterCropPad Col2Im Compress
    ConcatFromSequence ConvInteger DFT Det DynamicQuantizeLinear ImageDecoder MatMulInteger MaxRoiPool MaxUnpool
    MelWeightMatrix Multinomial NegativeLogLikelihoodLoss Optional OptionalGetElement OptionalHasElement QLinearConv
    QLinearMatMul RegexFullMatch SequenceAt SequenceConstruct SequenceEmpty SequenceErase SequenceInsert SequenceLength
    SequenceMap SoftmaxCrossEntropyLoss SplitToSequence StringConcat StringNormalizer StringSplit TfIdfVectorizer Unique
"""  # what has no entry in TAKES either; by name, so that a newer operator and a refused one can be told apart
SINCE: dict[str, Version] = {
    "Attention": (10, 14),
    "RMSNormalization": (10, 14),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
}
FLOATS = frozenset({D.FLOAT, D.FLOAT16, D.BFLOAT16})
HALVES = FLOATS - {D.BFLOAT16}
WHOLE = frozenset({D.INT32, D.INT64})
FLAGS = frozenset({D.BOOL})
QUANTISED = frozenset({D.INT8, D.INT4, D.FLOAT8E4M3FN, D.FLOAT4E2M1})
# Types of an operator's data, by the types; what is a shape, an index or an axis is not meant.
TYPES: dict[frozenset[ir.DataType], str] = {
    FLOATS: """
        Acos Acosh Asin Asinh Atan Atanh AveragePool BatchNormalization Ceil Celu Clip Conv ConvTranspose Cos Cosh
        CumSum Dropout Einsum Elu Erf Exp Floor GRU Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool GroupNormalization
        HardSigmoid HardSwish Hardmax ImageScaler InstanceNormalization IsInf LRN LSTM LayerNormalization LeakyRelu Log
        LogSoftmax LpNormalization LpPool MatMul MaxPool MeanVarianceNormalization PRelu ParametricSoftplus
        QuantizeLinear RMSNormalization RNN RandomNormal RandomNormalLike RandomUniform RandomUniformLike Reciprocal
        Resize RotaryEmbedding Round ScaledTanh Selu Sigmoid Sin Sinh Softmax Softplus Softsign Sqrt Tan Tanh
        ThresholdedRelu Upsample""",
    HALVES: """
        BlackmanWindow DeformConv GridSample HammingWindow HannWindow Mish NonMaxSuppression NonZero RoiAlign""",
    frozenset({D.FLOAT}): "STFT",
    FLOATS | WHOLE: """
        Abs Add ArgMax ArgMin DepthToSpace Div Equal Greater GreaterOrEqual IsNaN Less LessOrEqual Max Min Mod Mul Neg
        Pad Pow Range ReduceL1 ReduceL2 ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum
        ReduceSumSquare Relu Scatter ScatterElements ScatterND Shrink Sign SpaceToDepth Sub Sum TopK""",
    FLOATS | WHOLE | FLAGS: """
        Concat Expand EyeLike Flatten Gather GatherElements GatherND Identity OneHot Reshape ReverseSequence Shape Size
        Slice Split Squeeze Tile Transpose Trilu Unsqueeze Where""",
    FLOATS | WHOLE | FLAGS | {D.UINT8}: "Cast CastLike",
    FLOATS | WHOLE | FLAGS | (QUANTISED - {D.INT8}): "Constant ConstantOfShape",
    FLOATS | WHOLE | {D.INT8}: "Gelu",
    FLOATS | WHOLE | {D.FLOAT8E4M3FN}: "Mean",
    FLOATS | {D.INT8, D.FLOAT8E4M3FN}: "Attention",
    FLOATS | {D.INT32}: "TensorScatter",
    FLAGS: "And Not Or Xor",
    QUANTISED: "DequantizeLinear",
    frozenset(): "If Loop Scan",  # their bodies are looked at, node by node
}
TAKES = {name: types for types, names in TYPES.items() for name in names.split()}
DATA_INPUT = {"Where": 1, "OneHot": 2}
OUTPUTS_TYPED = frozenset(
    {"Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike", "RandomNormal", "RandomUniform"}
)
# Inputs that must be known when the engine is built: "initializer" or "build-time constant" in operators.md.
CONSTANT_INPUTS: dict[str, dict[int, str]] = {
    "CumSum": {1: "axis"},
    "Dropout": {2: "training_mode"},
    "OneHot": {1: "depth"},
    "STFT": {1: "frame_step", 2: "window"},
    "Squeeze": {1: "axes"},
    "Unsqueeze": {1: "axes"},
    **{name: {1: "axes"} for name in TAKES if name.startswith("Reduce")},
}
MODES: dict[str, dict[str, tuple[object, ...]]] = {
    "AveragePool": {"dilations": (1,)},
    "LpPool": {"dilations": (1,)},
    "MaxPool": {"dilations": (1,)},
    "Attention": {"softcap": (0.0,), "qk_matmul_output_mode": (0,)},
    "LSTM": {"input_forget": (0,), "layout": (0,)},
    "Resize": {
        "mode": ("nearest", "linear"),
        "coordinate_transformation_mode": (
            *("half_pixel", "pytorch_half_pixel", "tf_half_pixel_for_nn", "asymmetric", "align_corners"),
        ),
        "nearest_mode": ("floor", "ceil", "round_prefer_floor", "round_prefer_ceil"),
        "keep_aspect_ratio_policy": ("stretch",),
        "antialias": (0,),
    },
    "ScatterND": {"reduction": ("none",)},
    "TensorScatter": {"axis": (-2,)},
    "TopK": {"sorted": (1,)},
}
"""The values that an attribute may have, each of them where it is a list; an attribute that is absent is fine."""
FORBIDDEN_ATTRIBUTES = {"Constant": ("sparse_value", "value_string", "value_strings")}
OUTPUTS = {"Attention": 1, "LayerNormalization": 1, "MaxPool": 1}
INPUTS_LEFT_OUT = {"Attention": (4, 5, 6)}  # past_key, past_value, nonpad_kv_seqlen
MAX_TOPK = 3840


def refusals(model: ir.Model, version: Version = OLDEST) -> list[str]:
    """What the parser of a TensorRT version would refuse of a graph, one line for each node and reason.

    Weights may be placeholders without values. An empty list is no promise: kernels are the builder's business.
    """
    opset = model.opset_imports.get("", 0)
    if opset not in OPSETS:
        return [f"opset {opset} is not one of {OPSETS.start} to {OPSETS.stop - 1}"]  # 8
    if any(value.dtype is None for node, _ in _nodes(model.graph) for value in node.outputs):
        model = common.ShapeInferencePass()(model.clone()).model  # of an untyped value nothing can be said
    functions = {(name[0], name[1]) for name in model.functions}
    return [
        f"{node.op_type} {node.name}: {why}"
        for node, nested in _nodes(model.graph)
        if (node.domain, node.op_type) not in functions
        for why in _of_node(node, nested, opset, version)
    ]


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
    yield from _types(node, opset)
    yield from _attributes(node)
    yield from _constants(node)
    if node.op_type in SPECIAL:
        yield from SPECIAL[node.op_type](node, version)


def _missing(node: ir.Node, opset: int, version: Version) -> str | None:
    """1"""
    if node.domain not in ("", "ai.onnx"):
        return f"an operator of the domain {node.domain}"
    if node.op_type not in TAKES:
        return "TensorRT has no such operator" if node.op_type in NOT_THERE.split() else "an unknown operator"
    since = SINCE.get(node.op_type)
    if node.op_type == "GroupNormalization" and opset >= 21:
        since = (10, 15)  # NVIDIA/TensorRT issues 4313 and 4336
    if since is not None and version < since:
        return f"TensorRT has it since {'.'.join(map(str, since))}"
    return None


def _types(node: ir.Node, opset: int) -> Iterator[str]:
    """2, 3, 4"""
    values = [v for v in (*node.inputs, *node.outputs) if v is not None and v.dtype is not None]
    if any(v.dtype is D.DOUBLE for v in values):
        yield "float64 is computed in float32"
        return
    data = _data(node)
    if TAKES[node.op_type] and data is not None and data not in TAKES[node.op_type]:
        yield f"{_said(data)} is no type that TensorRT's {node.op_type} takes"
    for index, value in (*enumerate(node.inputs), *((-1 - i, v) for i, v in enumerate(node.outputs))):
        if value is not None and value.dtype is not None and not _legal(node.op_type, opset, index, value.dtype):
            since = next((v for v in OPSETS if v > opset and _legal(node.op_type, v, index, value.dtype)), None)
            if since is not None:
                yield f"{_said(value.dtype)} is no type of it in opset {opset}, only since {since}"
                return


def _data(node: ir.Node) -> ir.DataType | None:
    """The type that an operator computes in."""
    place = DATA_INPUT.get(node.op_type, 0)
    value = node.inputs[place] if place < len(node.inputs) else None
    if value is None or node.op_type in OUTPUTS_TYPED:
        value = node.outputs[0] if node.outputs else None
    return None if value is None else value.dtype


@cache
def _legal(op_type: str, opset: int, index: int, dtype: ir.DataType) -> bool:
    """Whether ONNX allows a type for an input, or for the output -1 - index."""
    import onnx

    schema = onnx.defs.get_schema(op_type, opset)
    formal = schema.inputs if index >= 0 else schema.outputs
    place = index if index >= 0 else -1 - index
    kinds = formal[min(place, len(formal) - 1)].types
    return not kinds or f"tensor({dtype.name.lower()})" in kinds


def _said(dtype: ir.DataType) -> str:
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _attributes(node: ir.Node) -> Iterator[str]:
    """5"""
    for name, allowed in MODES.get(node.op_type, {}).items():
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
        if len(node.inputs) > index and node.inputs[index] is not None:
            yield f"the input {index} is not supported"


def _constants(node: ir.Node) -> Iterator[str]:
    """6"""
    for index, name in CONSTANT_INPUTS.get(node.op_type, {}).items():
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
    if any(rank not in (None, 4) for rank in ranks):
        yield f"query, key, value and mask must have 4 dimensions, not {ranks}"


def _pool(node: ir.Node, version: Version) -> Iterator[str]:
    rank = _rank(node.inputs[0])
    if rank not in (None, 4, 5):
        yield f"only 2-D and 3-D pooling is supported, the input has {rank} dimensions"


def _grid_sample(node: ir.Node, version: Version) -> Iterator[str]:
    rank, most = _rank(node.inputs[0]), 5 if version >= (11, 2) else 4
    if rank is not None and not 4 <= rank <= most:
        yield f"the input has {rank} dimensions (expected 4, from TensorRT 11.2 on also 5)"


def _convolution(node: ir.Node, version: Version) -> Iterator[str]:
    if any(v is not None and v.dtype is D.BFLOAT16 for v in node.inputs):
        yield "no bfloat16 kernel (TensorRT-Incubator issue 565)"


def _resize(node: ir.Node, version: Version) -> Iterator[str]:
    axes, rank = node.attributes.get("axes"), _rank(node.inputs[0])
    by_scales = len(node.inputs) > 2 and node.inputs[2] is not None
    if axes is not None and by_scales and rank is not None and list(axes.as_ints()) != list(range(rank)):
        yield f"axes = {list(axes.as_ints())} (expected all {rank}, in order)"


def _top_k(node: ir.Node, version: Version) -> Iterator[str]:
    count = _values(node.inputs[1])
    if count is not None and count[0] >= MAX_TOPK:
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
    "QuantizeLinear": _zero_point,
    "Resize": _resize,
    "TensorScatter": _tensor_scatter,
    "TopK": _top_k,
}
