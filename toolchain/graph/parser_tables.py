"""What TensorRT's ONNX parser takes, as tables: operators, types, attributes, inputs that must be constants.

Those of TensorRT are those of onnx-tensorrt's docs/operators.md (10.15; 11.1 adds nothing that an export writes), with
the versions of its changelog and issues. Those of TensorRT for RTX say where its parser and builder, asked node by
node (1.7.1: each operator in each type, and the examples of ONNX itself), differ from them. `parser_rules` reads both.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

Version = tuple[int, ...]
D = ir.DataType
OLDEST: Version = (10, 13)
OPSETS = range(9, 25)
OPSETS_RTX = range(7, 26)

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
KNOWN = frozenset().union(*TAKES.values(), {D.UINT8, D.DOUBLE})
DATA_INPUT = {"Where": 1, "OneHot": 2}
OUTPUTS_TYPED = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape", "EyeLike"}) | {
    *("RandomNormal", "RandomUniform", "BlackmanWindow", "HammingWindow", "HannWindow")
}
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
Modes = Mapping[str, tuple[object, ...]]
MODES: dict[str, Modes] = {
    "AveragePool": {"dilations": (1,)},
    "BatchNormalization": {"training_mode": (0,)},
    "LpPool": {"dilations": (1,), "p": (1, 2)},
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
    "TensorScatter": {"axis": (-2,), "mode": ("linear",)},
    "TopK": {"sorted": (1,)},
}
"""The values that an attribute may have, each of them where it is a list; an attribute that is absent is fine."""
FORBIDDEN_ATTRIBUTES = {"Constant": ("sparse_value", "value_string", "value_strings")}
OUTPUTS = {"Attention": 1, "LayerNormalization": 1, "MaxPool": 1}
INPUTS_LEFT_OUT = {"Attention": (4, 5, 6)}  # past_key, past_value, nonpad_kv_seqlen
MAX_TOPK = 3840

# TensorRT for RTX

PLUGINS = "DeformConv NonMaxSuppression NonZero RoiAlign"
"""Operators that are plugins, of which it has none. At some RoiAlign its parser crashes."""
ALSO: dict[frozenset[ir.DataType], str] = {
    FLOATS: "GridSample STFT Swish",
    FLAGS: "Equal",
    WHOLE | FLAGS | {D.INT8}: "Dropout",
    WHOLE: "Clip CumSum GlobalAveragePool GlobalMaxPool",
    frozenset({D.INT8}): """
        Abs Add ArgMax ArgMin AveragePool Cast CastLike Concat Conv DepthToSpace Div Equal Erf Expand EyeLike Flatten
        Gather GatherElements GatherND GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish
        Identity InstanceNormalization LRN LeakyRelu Less LessOrEqual Max MaxPool Min Mul Neg PRelu Pad Reciprocal
        ReduceL1 ReduceMax ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence Scatter
        ScatterElements ScatterND Shape Shrink Sign Size Slice Softsign SpaceToDepth Split Squeeze Sub Sum
        ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze Upsample Where""",
}
BUT_NOT: dict[frozenset[ir.DataType], str] = {
    WHOLE | {D.INT8}: "Gelu",
    WHOLE: "IsNaN Mean ReduceL2 ReduceLogSum ReduceLogSumExp",
    FLOATS - {D.FLOAT}: "Celu MeanVarianceNormalization Range",
    frozenset({D.BFLOAT16}): "GRU GlobalLpPool HardSwish LpNormalization LpPool Shrink",
    frozenset({D.INT32}): "Relu TensorScatter",
    frozenset({D.FLOAT8E4M3FN}): "Mean",
}


def _takes_rtx() -> dict[str, frozenset[ir.DataType]]:
    takes = {name: types for name, types in TAKES.items() if name not in PLUGINS.split()}
    for types, names in ALSO.items():
        takes |= {name: takes.get(name, frozenset()) | types for name in names.split()}
    for types, names in BUT_NOT.items():
        takes |= {name: takes[name] - types for name in names.split()}
    return takes


TAKES_RTX = _takes_rtx()
NO_BFLOAT16 = frozenset(
    name
    for takes in (TAKES, TAKES_RTX)
    for name, types in takes.items()
    if D.FLOAT in types and D.BFLOAT16 not in types
)
"""Operators that one of the parsers takes in float32 and not in bfloat16."""
NONPAD = 6
"""The input of Attention that only this parser takes: nonpad_kv_seqlen."""
CONSTANT_INPUTS_RTX = {name: CONSTANT_INPUTS[name] for name in CONSTANT_INPUTS.keys() - {"CumSum", "OneHot"}}
MODES_RTX: dict[str, Modes] = {
    **MODES,
    "Attention": {"softcap": (0.0,)},
    "LSTM": {"input_forget": (0,)},
    "Resize": {**MODES["Resize"], "mode": ("nearest", "linear", "cubic")},
    "ScatterElements": {"reduction": ("none",)},
    "TopK": {},
}
CONVERTED = frozenset({"Clip", "Pad"})
"""Operators whose constants may be of another type than their data: the parser converts them."""
