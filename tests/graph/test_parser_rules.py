"""The numbered cases of `refusals`, each asked of the real parser too; exports: tests/test_precision_matrix.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.test_simplify import constant, model
from tests.rtx import Parsed, real_trt
from toolchain.engines.tensorrt.library import numbers
from toolchain.graph.parser_rules import refusals
from toolchain.graph.parser_tables import NOT_THERE, OLDEST, TAKES, TAKES_RTX, Version
from toolchain.graph.placeholder import placeholder

D = ir.DataType
PICTURE = (1, 4, 8, 8)


def typed(name: str, dtype: ir.DataType = D.FLOAT, shape: tuple[int, ...] = PICTURE) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def held(name: str, dtype: ir.DataType, shape: tuple[int, ...] = PICTURE) -> ir.Value:
    """A weight without values."""
    found = typed(name, dtype, shape)
    found.const_value = placeholder(name, dtype, shape)
    return found


def one(
    op_type: str,
    *inputs: ir.Value | None,
    opset: int = 20,
    dtype: ir.DataType = D.FLOAT,
    shape: tuple[int, ...] = PICTURE,
    outputs: int = 1,
    domain: str = "",
    **attributes: Any,
) -> ir.Model:
    """A graph of one node; inputs that have a value are initializers."""
    results = [typed(f"y{i}", dtype, shape) for i in range(outputs)]
    node = ir.node(op_type, inputs, attributes, outputs=results, name="n", domain=domain)
    given = [v for v in inputs if v is not None]
    weights = [v for v in given if v.const_value is not None]
    made = model([node], [v for v in given if v.const_value is None], results, weights)
    made.opset_imports[""] = opset
    return made


X, HALF, BF, DOUBLE = typed("x"), D.FLOAT16, D.BFLOAT16, D.DOUBLE


def x(dtype: ir.DataType = D.FLOAT, shape: tuple[int, ...] = PICTURE) -> ir.Value:
    return typed("x", dtype, shape)


def ints(name: str, *values: int) -> ir.Value:
    return constant(name, np.int64(list(values)))


def dynamic(op_type: str) -> ir.Model:
    return one(op_type, ir.Value(name="x", shape=ir.Shape(["n", 4]), type=ir.TensorType(D.FLOAT)))


def conv(op_type: str, dtype: ir.DataType, opset: int) -> ir.Model:
    return one(op_type, x(dtype), held("w", dtype, (4, 4, 1, 1)), opset=opset, dtype=dtype)


def resize(**attributes: Any) -> ir.Model:
    return one("Resize", x(), None, constant("s", np.float32([1, 1, 2, 2])), **attributes)


HEADS = (1, 2, 8, 32)
"""A shape that a fused kernel takes: for others the builder wants attention to be decomposable."""


def attention(
    shape: tuple[int, ...] = HEADS, opset: int = 23, more: tuple[ir.Value | None, ...] = (), **attributes: Any
) -> ir.Model:
    q, k, v = (typed(n, HALF, shape) for n in "qkv")
    return one("Attention", q, k, v, *more, opset=opset, dtype=HALF, shape=shape, **attributes)


def quantised(point: int | None, scale: str = "float16", given: str = "float16") -> ir.Model:
    """y = DequantizeLinear(QuantizeLinear(x))"""
    kinds = {"float16": HALF, "float32": D.FLOAT}
    first, second = constant("s", np.array([1], given)), constant("t", np.array([1], scale))
    points = [] if point is None else [constant("p", np.int8([point]))]
    small = typed("i", D.INT8)
    q = ir.node("QuantizeLinear", [typed("x", kinds[given]), first, *points], outputs=[small], name="q")
    out = typed("y", kinds[scale])
    dq = ir.node("DequantizeLinear", [small, second, *points], outputs=[out], name="dq")
    return model([q, dq], [q.inputs[0]], [out], [first, second, *points])  # type: ignore[list-item]


def branches(body: Callable[[ir.Value], ir.Node], opset: int = 23, rename: bool = True) -> ir.Model:
    """If(c): body(x), else x."""

    def branch(node: ir.Node, name: str) -> ir.Graph:
        node.outputs[0].name = name
        return ir.Graph([], [node.outputs[0]], nodes=[node], name=name)

    given, condition, out = x(HALF), typed("c", D.BOOL, ()), typed("y", HALF)
    then = branch(body(given), "a")
    other = branch(ir.node("Identity", [given], outputs=[typed("b", HALF)]), "b" if rename else "a")
    node = ir.node("If", [condition], {"then_branch": then, "else_branch": other}, outputs=[out], name="n")
    made = model([node], [given, condition], [out], [])
    made.opset_imports[""] = opset
    return made


def inner(op_type: str, shape: tuple[int, ...] = PICTURE, count: int = 1) -> Callable[[ir.Value], ir.Node]:
    return lambda v: ir.node(op_type, [v] * count, outputs=[typed("a", HALF, shape)], name="inner")


def group_normalization(scales: int, opset: int) -> ir.Model:
    scale, bias = (held(n, D.FLOAT, (scales,)) for n in "sb")
    return one("GroupNormalization", x(), scale, bias, opset=opset, num_groups=2)


def top_k(count: int, **attributes: Any) -> ir.Model:
    return one("TopK", x(shape=(1, 5000)), ints("k", count), outputs=2, shape=(1, count), **attributes)


def grid_sample(dimensions: int) -> ir.Model:
    sizes = (2,) * dimensions
    return one("GridSample", x(shape=(1, 1, *sizes)), typed("g", shape=(1, *sizes, dimensions)), shape=(1, 1, *sizes))


RTX, NEWEST = (1, 7, 1), (11, 4)


@dataclass(frozen=True)
class Case:
    """A graph, and what is said of it.

    says     our rules for `version`, in part; None where they have nothing to say
    real     NVIDIA's parser for RTX, or its builder, in part; None where they take it
    version  of TensorRT, or of TensorRT for RTX where a rule is for that alone
    differs  why our rules for RTX are not of one mind with the real parser, where they are not
    """

    model: ir.Model
    says: str | None
    real: str | None
    version: Version = OLDEST
    differs: str | None = None


BY_DESIGN = "it is taken, and computes something else than the graph says"
NO_CHECK = "the real parser asks no opset, and reads newer operators by older rules"
CASES: dict[str, Case] = {
    "1 no such operator": Case(one("Det", x(), shape=(1, 4)), "Det n: TensorRT has no such operator", "Det n: false"),
    "1 an operator that nobody knows": Case(
        one("Frobnicate", x()), "Frobnicate n: an unknown operator", "Plugin not found"
    ),
    "1 another domain": Case(
        one("Gelu", x(), domain="com.microsoft"),
        "an operator of the domain com.microsoft",
        None,
        differs="the real parser looks at the operator's name alone",
    ),
    "1 attention": Case(attention(), "since 10.14", None),
    "1 attention of a newer version": Case(attention(), None, None, (10, 14)),
    "1 group normalization": Case(group_normalization(4, 21), "since 10.15", None),
    "1 group normalization of a newer version": Case(group_normalization(4, 21), None, None, (10, 15)),
    "1 group normalization of opset 18": Case(group_normalization(2, 18), None, None),
    "1 a newer operator": Case(one("Swish", x(), opset=24), "an unknown operator", None),
    "1 a plugin": Case(
        one("DeformConv", x(), held("w", D.FLOAT, (4, 4, 1, 1)), typed("o", shape=(1, 2, 8, 8))),
        "TensorRT for RTX has none",
        "Plugin not found",
        RTX,
    ),
    "1 a plugin of TensorRT": Case(
        one("DeformConv", x(), held("w", D.FLOAT, (4, 4, 1, 1)), typed("o", shape=(1, 2, 8, 8))),
        None,
        "Plugin not found",
    ),
    "2 integers in clip": Case(
        one("Clip", x(D.INT64), dtype=D.INT64), "int64 is no type that TensorRT's Clip takes", None
    ),
    "2 integers in cumsum": Case(
        one("CumSum", x(D.INT32), ints("a", 1), dtype=D.INT32), "int32 is no type that TensorRT's CumSum takes", None
    ),
    "2 uint8": Case(
        one("Transpose", x(D.UINT8), dtype=D.UINT8, perm=[0, 2, 3, 1]), "uint8 is no type", "has type UInt8 but must"
    ),
    "2 the data of where": Case(
        one("Where", typed("c", D.BOOL), x(D.INT8), typed("z", D.INT8), dtype=D.INT8), "int8 is no type", None
    ),
    "2 what cast makes": Case(
        one("Cast", x(), dtype=D.INT16, to=int(D.INT16)), "int16 is no type", "Unsupported data type for the Cast"
    ),
    "2 what cast takes": Case(
        one("Cast", x(D.FLOAT8E5M2), to=1), "float8e5m2 is no type of TensorRT", "Failed to convert ONNX date type"
    ),
    "2 mish in bfloat16": Case(
        one("Mish", x(BF), opset=22, dtype=BF),
        "bfloat16 is no type that TensorRT's Mish takes",
        "Only FLOAT32 or FLOAT16 input is supported for the Mish",
    ),
    "2 integers in a norm": Case(
        one("ReduceL2", x(D.INT32), dtype=D.INT32),
        "int32 is no type that TensorRT's ReduceL2 takes",
        "data type INT32",
        RTX,
    ),
    "2 a range of floats": Case(
        one(
            "Range",
            *(constant(n, np.float16(v)) for n, v in zip("abc", (0, 4, 1), strict=True)),
            dtype=HALF,
            shape=(4,),
        ),
        "float16 is no type that TensorRT's Range takes",
        "only supports int32, int64, and float input types for Range",
        RTX,
    ),
    "2 the length of a window": Case(one("HannWindow", constant("n", np.int64(8)), shape=(8,)), None, None),
    "2 indices": Case(one("Gather", x(HALF), typed("i", D.INT64, (2,)), dtype=HALF, shape=(2, 4, 8, 8)), None, None),
    "2 a condition": Case(one("Where", typed("c", D.BOOL), x(), typed("z")), None, None),
    "2 pixels": Case(one("Cast", x(), dtype=D.UINT8, to=int(D.UINT8)), None, None),
    "3 bfloat16 convolution": Case(conv("Conv", BF, 20), "bfloat16 is no type of it in opset 20, only since 22", None),
    "3 bfloat16 instance normalization": Case(
        one("InstanceNormalization", x(BF), held("s", BF, (4,)), held("b", BF, (4,)), opset=21, dtype=BF),
        "only since 22",
        None,
    ),
    "3 bfloat16 convolution of opset 22": Case(conv("Conv", BF, 22), None, None),
    "3 float16 convolution": Case(conv("Conv", HALF, 20), None, None),
    "3 bfloat16 product": Case(one("MatMul", x(BF), held("w", BF), dtype=BF), None, None),
    "3 what no opset has, but TensorRT": Case(one("Einsum", x(BF), dtype=BF, equation="abcd->abcd"), None, None),
    "4 float64": Case(
        one("Add", x(DOUBLE), typed("z", DOUBLE), dtype=DOUBLE),
        "float64 is computed in float32",
        None,
        differs=BY_DESIGN,
    ),
    "4 a cast to float64": Case(one("Cast", x(), dtype=DOUBLE, to=int(DOUBLE)), "float64", None, differs=BY_DESIGN),
    "5 cubic": Case(resize(mode="cubic"), "mode = 'cubic' (expected 'nearest' or 'linear')", None),
    "5 antialias": Case(resize(mode="linear", antialias=1), "antialias = 1", "Antialiasing is not supported"),
    "5 coordinates": Case(
        resize(coordinate_transformation_mode="tf_crop_and_resize"),
        "coordinate_transformation_mode",
        "TensorRT only supports half_pixel",
    ),
    "5 axes": Case(
        one("Resize", x(), None, constant("s", np.float32([2, 2])), axes=[2, 3]),
        "axes = [2, 3] (expected all 4, in order)",
        None,
    ),
    "5 aspect ratio": Case(
        resize(keep_aspect_ratio_policy="not_larger"), "keep_aspect_ratio_policy", "Only `stretch` is supported"
    ),
    "5 nearest": Case(
        resize(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"), None, None
    ),
    "5 dilated pool": Case(
        one("MaxPool", x(), kernel_shape=[2, 2], dilations=[2, 2]),
        "dilations",
        "does not support dilations other than 1",
    ),
    "5 undilated": Case(one("MaxPool", x(), kernel_shape=[2, 2], dilations=[1, 1]), None, None),
    "5 pool in 1-D": Case(one("MaxPool", x(shape=(1, 4, 8)), shape=(1, 4, 7), kernel_shape=[2]), "2-D and 3-D", None),
    "5 indices of a pool": Case(
        one("MaxPool", x(), outputs=2, kernel_shape=[2, 2]), "the output y1 is not supported", "1 outputs for MaxPool"
    ),
    "5 a third norm": Case(one("LpPool", x(), kernel_shape=[2, 2], p=3), "p = 3", "Only L1 and L2 normalization"),
    "5 mean of a normalization": Case(
        one("LayerNormalization", x(), held("s", D.FLOAT, (8,)), outputs=2),
        "the output y1 is not supported: only the first is",
        "1 outputs for LayerNormalization",
    ),
    "5 unused outputs": Case(one("LayerNormalization", x(), held("s", D.FLOAT, (8,))), None, None),
    "5 training": Case(
        one("BatchNormalization", x(), *(held(n, D.FLOAT, (4,)) for n in "sbmv"), training_mode=1),
        "training_mode = 1",
        "does not support training_mode == 1",
    ),
    "5 remainder of floats": Case(one("Mod", x(), typed("z")), "fmod = 0", "Inputs cannot be of floating point types"),
    "5 too many of top-k": Case(top_k(3840), "K = 3840 (expected less than 3840)", None),
    "5 few of top-k": Case(top_k(2), None, None),
    "5 unsorted": Case(top_k(2, sorted=0), "sorted = 0", None),
    "5 scatter": Case(
        one("ScatterND", x(), held("i", D.INT64, (2, 1)), typed("u", shape=(2, 4, 8, 8)), reduction="add"),
        "reduction = 'add' (expected 'none')",
        "ScatterND with reduction is not supported",
    ),
    "5 scatter by elements": Case(
        one("ScatterElements", x(), typed("i", D.INT64), typed("u"), reduction="mul"),
        "reduction = 'mul'",
        "Unsupported reduction type",
        RTX,
    ),
    "5 grid in 5-D": Case(grid_sample(3), "5 dimensions", None),
    "5 grid in 5-D of a newer version": Case(grid_sample(3), None, None, (11, 2)),
    "5 unknown size": Case(dynamic("EyeLike"), "the input's dimensions must be known", "does not work for dynamically"),
    "5 text": Case(
        one("Constant", value_string="a"), "value_string is not supported", "does not support the sparse_value"
    ),
    "5 transposed bfloat16 convolution": Case(
        conv("ConvTranspose", BF, 22), "no bfloat16 kernel", "Could not infer output types for operation"
    ),
    "5 transposed float16 convolution": Case(conv("ConvTranspose", HALF, 22), None, None),
    "5 batches of an LSTM": Case(
        one(
            *("LSTM", x(shape=(2, 3, 4)), held("w", D.FLOAT, (1, 12, 4)), held("r", D.FLOAT, (1, 12, 3))),
            shape=(2, 3, 1, 3),
            hidden_size=3,
            layout=1,
        ),
        "layout = 1",
        None,
    ),
    "5 attention in 3-D": Case(
        attention((1, 8, 64), q_num_heads=2, kv_num_heads=2), "must have 4 dimensions", None, NEWEST
    ),
    "5 softcap": Case(attention(softcap=3.0), "softcap = 3.0", "Setting softcap is not supported", NEWEST),
    "5 the default of softcap": Case(attention(softcap=0.0, is_causal=1), None, None, NEWEST),
    "5 past": Case(
        attention(more=(None, typed("p", HALF, HEADS), typed("r", HALF, HEADS)), outputs=3),
        "the input 4 is not supported",
        "only supports Attention nodes with one output",
        NEWEST,
    ),
    "5 lengths": Case(
        attention(more=(None, None, None, typed("n", D.INT64, (1,))), opset=24),
        "the input 6 is not supported",
        None,
        NEWEST,
    ),
    "5 a mask": Case(attention(more=(typed("m", HALF, (1, 2, 8, 8)),)), None, None, NEWEST),
    "5 a mask in 2-D": Case(attention(more=(typed("m", HALF, (8, 8)),)), "must have 4 dimensions", None, NEWEST),
    "5 a causal mask": Case(
        attention(more=(typed("m", HALF, (1, 2, 8, 8)),), is_causal=1),
        "is_causal and a mask exclude each other",
        "mask cannot be used together with CausalMaskKind",
        RTX,
    ),
    "5 wider values": Case(
        one(
            "Attention",
            *(typed(n, HALF, (1, 2, 8, w)) for n, w in zip("qkv", (32, 32, 64), strict=True)),
            opset=23,
            dtype=HALF,
        ),
        "key and value must have one shape",
        "Key and Value must have the same shape",
        RTX,
    ),
    "5 cache in 3-D": Case(
        one("TensorScatter", x(shape=(1, 8, 8)), typed("u", shape=(1, 8, 8)), opset=24, shape=(1, 8, 8)),
        "past_cache and update must have 4 dimensions",
        "past_cache tensor is required to be 4D",
        NEWEST,
    ),
    "6 axes": Case(
        one("ReduceMean", x(), typed("a", D.INT64, (1,))),
        "axes is computed, it must be a constant",
        "must resolve to a build-time constant",
    ),
    "6 constant axes": Case(one("ReduceMean", x(), ints("a", 1), shape=(1, 1, 8, 8)), None, None),
    "6 no axes": Case(one("ReduceMean", x(), shape=(1, 1, 1, 1)), None, None),
    "6 axes to squeeze": Case(
        one("Squeeze", x(), typed("a", D.INT64, (1,)), shape=(4, 8, 8)), "axes is computed", "axis is not a constant"
    ),
    "6 axis": Case(one("CumSum", x(), typed("a", D.INT64, ())), "axis is computed", None),
    "6 depth": Case(
        one(
            "OneHot",
            typed("i", D.INT64, (3,)),
            typed("d", D.INT64, ()),
            constant("v", np.float32([0, 1])),
            shape=(3, 8),
        ),
        "depth is computed",
        None,
    ),
    "6 training": Case(
        one("Dropout", x(), constant("r", np.float32(0.5)), typed("t", D.BOOL, ())),
        "training_mode is computed",
        "only supports the training_mode input as an initializer",
    ),
    "7 a zero point": Case(quantised(3), "the zero point must be 0", "Non-zero zero point is not supported"),
    "7 a zero point that is not known": Case(
        one("QuantizeLinear", x(), constant("s", np.float32([1])), held("p", D.INT8, (1,)), dtype=D.INT8),
        "the zero point is not known",
        None,
        differs="the real parser was given its values, which are zeros here",
    ),
    "7 a wider scale": Case(quantised(None, "float32"), "its scale is float32", None, differs=BY_DESIGN),
    "7 no zero point": Case(quantised(None), None, None),
    "7 a narrower scale": Case(quantised(0, "float16", "float32"), None, None),
    "7 zero": Case(quantised(0), None, None),
    "8 newer than TensorRT's": Case(one("Abs", x(), opset=25), "opset 25 is not one of 9 to 24", None),
    "8 too new": Case(one("Abs", x(), opset=26), "opset 26 is not one of 7 to 25", None, RTX, NO_CHECK),
    "8 older than TensorRT's": Case(one("Abs", x(), opset=8), "opset 8 is not one of 9 to 24", None),
    "8 too old": Case(
        one("Abs", x(), opset=6), "opset 6 is not one of 7 to 25", None, RTX, "the real parser only warns"
    ),
    "8 the newest": Case(one("Abs", x(), opset=24), None, None),
    "9 in a branch": Case(branches(inner("Det")), "Det inner: TensorRT has no such operator", "Det inner: false"),
    "9 of another rank": Case(branches(inner("Neg", (8, 8))), "the branches give 2 and 4 dimensions", None),
    "9 of one name": Case(branches(inner("Neg"), rename=False), "both branches call their output a", None),
    "9 attention in a branch": Case(
        branches(inner("Attention", count=3)),
        "inside of an If or Loop",
        "unknown input tensor or sequence name",
        NEWEST,
    ),
    "9 branches": Case(branches(inner("Neg")), None, None),
}
SAME = "must have same input types"
PAIRS = {
    (HALF, D.FLOAT): "Add Sub Mul Div Max Equal Greater MatMul Sum",
    (BF, D.FLOAT): "Add Mul MatMul",
    (D.INT32, D.INT64): "Add Mul Div Min Less Mod",
}
W, B = (4, 4, 1, 1), (4,)
MIXED: dict[str, tuple[ir.Model, str]] = {
    **{
        f"{op} of {first.name.lower()} and {second.name.lower()}": (
            one(op, x(first), typed("z", second), opset=22, dtype=first),
            SAME,
        )
        for (first, second), ops in PAIRS.items()
        for op in ops.split()
    },
    **{
        f"Concat of {first.name.lower()} and {second.name.lower()}": (
            one("Concat", x(first), typed("z", second), dtype=first, shape=(2, 4, 8, 8), axis=0),
            "`inputs` must all be of the same type",
        )
        for first, second in PAIRS
    },
    "Where": (
        one("Where", typed("c", D.BOOL), x(HALF), typed("z"), dtype=HALF),
        "of same types but has",
    ),
    "PRelu": (one("PRelu", x(HALF), typed("z"), dtype=HALF), "`slopes` must be of same types"),
    "Gemm": (one("Gemm", x(HALF, (4, 8)), held("z", D.FLOAT, (8, 8)), dtype=HALF, shape=(4, 8)), SAME),
    "the bias of Gemm": (
        one("Gemm", x(HALF, (4, 8)), held("w", HALF, (8, 8)), held("z", D.FLOAT, (8,)), dtype=HALF, shape=(4, 8)),
        SAME,
    ),
    "the weights of Conv": (one("Conv", x(HALF), held("z", D.FLOAT, W), dtype=HALF), "`kernel` must be of same type"),
    "the bias of Conv": (
        one("Conv", x(HALF), held("w", HALF, W), held("z", D.FLOAT, B), dtype=HALF),
        "`bias` must be of same type",
    ),
    "the bias of ConvTranspose": (
        one("ConvTranspose", x(HALF), held("w", HALF, W), held("z", D.FLOAT, B), dtype=HALF),
        "`bias_weights` must have same type",
    ),
    "the scale of LayerNormalization": (
        one("LayerNormalization", x(HALF), held("z", D.FLOAT, (8,)), dtype=HALF),
        "`scale` must have identical types",
    ),
    "the scale of InstanceNormalization": (
        one("InstanceNormalization", x(HALF), held("z", D.FLOAT, B), held("b", D.FLOAT, B), dtype=HALF),
        "Inputs must be either all FLOAT or all FLOAT16",
    ),
    "Einsum": (
        one("Einsum", x(HALF), typed("z"), dtype=HALF, equation="abcd,abcd->abcd"),
        "must have all inputs of same type",
    ),
    "ScatterND": (
        one("ScatterND", x(HALF), held("i", D.INT64, (1, 1)), typed("z"), dtype=HALF),
        "`updates` must have identical types",
    ),
    "GridSample": (
        one("GridSample", x(HALF), typed("z", shape=(1, 8, 8, 2)), dtype=HALF),
        "`grid` must be of same type",
    ),
    "Attention": (
        one("Attention", x(HALF, HEADS), typed("z", shape=HEADS), typed("v", HALF, HEADS), opset=23, dtype=HALF),
        "Error during shape inference",
    ),
    "a computed bound of Clip": (one("Clip", x(HALF), typed("z", shape=()), dtype=HALF), SAME),
}
"""x and z are of two types where ONNX wants one; beside it, what NVIDIA's parser for RTX says."""
CASES |= {
    f"10 {name}": Case(given, "they must be of one type, nothing is cast", real, NEWEST)
    for name, (given, real) in MIXED.items()
} | {
    "10 a constant bound of Clip": Case(
        one("Clip", x(HALF), constant("z", np.float32(0)), dtype=HALF), "x is float16 and z is float32", None
    ),
    "10 a constant value of Pad": Case(
        one(
            "Pad",
            x(HALF),
            ints("p", 0, 0, 0, 0, 0, 0, 0, 1),
            constant("z", np.float32(0)),
            dtype=HALF,
            shape=(1, 4, 8, 9),
        ),
        "x is float16 and z is float32",
        None,
    ),
    "10 powers": Case(one("Pow", x(HALF), typed("z"), dtype=HALF), None, None),
    "10 indices": Case(one("Gather", x(HALF), held("i", D.INT64, (2,)), dtype=HALF, shape=(2, 4, 8, 8)), None, None),
    "10 a condition": Case(one("Where", typed("c", D.BOOL), x(HALF), typed("z", HALF), dtype=HALF), None, None),
    "10 shapes and data": Case(one("Reshape", x(HALF), ints("s", 4, 64), dtype=HALF, shape=(4, 64)), None, None),
}


def reported(given: ir.Model, *version: Any) -> str:
    return "\n".join(refusals(given, *version))


def asked(given: ir.Model) -> str:
    """What NVIDIA's parser and builder refuse of a graph; of shapes that are not known the builder is not asked."""
    parsed = Parsed(given)
    inputs = [parsed.network.get_input(i) for i in range(parsed.network.num_inputs)]
    if parsed.refused:
        return "\n".join(parsed.refused)
    if any(t.is_shape_tensor or -1 in tuple(t.shape) for t in inputs):
        return ""
    return "" if parsed.build() else "\n".join(parsed.errors() or ["no reason given"])


@pytest.mark.parametrize("case", CASES)
def test_the_rules_beside_the_real_parser(case: str) -> None:
    """Where the wheels are missing, our half is tested and the other one skipped."""
    given = CASES[case]
    told = reported(given.model, given.version)
    assert told == "" if given.says is None else given.says in told
    version = numbers(real_trt().__version__)
    real, ours = asked(given.model), reported(given.model, version)
    assert real == "" if given.real is None else given.real in real
    assert (bool(ours) != bool(real)) == (given.differs is not None), (ours, real)


def operands(op_type: str) -> int:
    """How many tensors of one type an operator needs, and nothing else; 0 for operators of another kind."""
    import onnx

    schema = onnx.defs.get_schema(op_type, 24)
    needed = [
        formal for formal in schema.inputs if formal.option is not onnx.defs.OpSchema.FormalParameterOption.Optional
    ]
    plain = all(formal.type_str == "T" for formal in needed)
    return len(needed) if plain and not any(a.required for a in schema.attributes.values()) else 0


LEGACY = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}
"""Operators of operators.md that are long gone from ONNX."""
OTHER_SHAPES = {"Conv", "ConvTranspose", "Gemm", "LayerNormalization", "TensorScatter"}
WITHOUT_BOUNDS = ("Clip", D.INT8)
"""Taken so; with bounds, as the table has it, it is not."""


@pytest.mark.parametrize("dtype", [HALF, BF, D.INT32, D.INT64, D.INT8, D.BOOL], ids=lambda d: d.name.lower())
def test_the_types_of_every_plain_operator(dtype: ir.DataType) -> None:
    """The table of types for TensorRT for RTX, against its parser and builder."""
    version = numbers(real_trt().__version__)
    seen, wrong = 0, []
    for op_type in sorted(TAKES_RTX.keys() - LEGACY - OTHER_SHAPES):
        count = operands(op_type)
        if 0 < count < 3 and (op_type, dtype) != WITHOUT_BOUNDS:
            given = one(op_type, *[typed(n, dtype) for n in "xz"[:count]], opset=24, dtype=dtype)
            ours, real = reported(given, version), asked(given)
            seen += 1
            wrong += [] if bool(ours) == bool(real) else [(op_type, ours, real)]
    assert wrong == []
    assert seen > 80


def test_every_reason_is_given() -> None:
    lines = refusals(resize(mode="cubic", antialias=1))
    assert len(lines) == 2
    assert all(line.startswith("Resize n: ") for line in lines)


def test_untyped_values_are_typed_first() -> None:
    """A pass may leave values without types; a rule that saw none would be silent."""
    hidden = ir.Value(name="h", shape=ir.Shape(PICTURE))
    first = ir.node("Cast", [x()], {"to": int(D.INT64)}, outputs=[hidden], name="a")
    second = ir.node("Clip", [hidden], outputs=[typed("y", D.INT64)], name="n")
    given = model([first, second], [first.inputs[0]], [second.outputs[0]], [])  # type: ignore[list-item]
    assert reported(given) == "Clip n: int64 is no type that TensorRT's Clip takes"
    assert hidden.dtype is None


def test_the_tables_are_onnx_operators() -> None:
    """A misspelt name in a table would never match."""
    import onnx

    known = {schema.name for schema in onnx.defs.get_all_schemas()}
    assert set(TAKES_RTX) - LEGACY <= known
    assert set(TAKES) - LEGACY <= known
    assert set(NOT_THERE.split()) <= known
    assert not set(NOT_THERE.split()) & set(TAKES)
