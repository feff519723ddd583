"""The numbered cases of `refusals`, and what it must not complain about: every graph that we export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.test_simplify import constant, model
from tests.tiny import make_sd, recipe_for
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import make_sd3
from tests.tiny_sdxl import make_sdxl
from toolchain.engines.tensorrt import TensorRtBackend
from toolchain.export.capture import capture
from toolchain.graph.parser_rules import NOT_THERE, TAKES, refusals
from toolchain.graph.placeholder import placeholder
from toolchain.models import MODELS, resolve_model
from toolchain.recipe import Bucket

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
    return one(op_type, x(dtype), held("w", dtype), opset=opset, dtype=dtype)


def resize(**attributes: Any) -> ir.Model:
    return one("Resize", x(), None, constant("s", np.float32([1, 1, 2, 2])), **attributes)


def attention(shape: tuple[int, ...] = PICTURE, opset: int = 23, **attributes: Any) -> ir.Model:
    q, k, v = (typed(n, HALF, shape) for n in "qkv")
    return one("Attention", q, k, v, opset=opset, dtype=HALF, shape=shape, **attributes)


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


REFUSED: dict[str, tuple[ir.Model, str]] = {
    "1 no such operator": (one("Det", x(), shape=(1, 4)), "Det n: TensorRT has no such operator"),
    "1 an operator that nobody knows": (one("Frobnicate", x()), "Frobnicate n: an unknown operator"),
    "1 another domain": (one("Gelu", x(), domain="com.microsoft"), "an operator of the domain com.microsoft"),
    "1 attention": (attention(), "since 10.14"),
    "1 group normalization": (
        one("GroupNormalization", x(), held("s", D.FLOAT, (4,)), held("b", D.FLOAT, (4,)), opset=21, num_groups=2),
        "since 10.15",
    ),
    "2 integers in clip": (one("Clip", x(D.INT64), dtype=D.INT64), "int64 is no type that TensorRT's Clip takes"),
    "2 uint8": (one("Transpose", x(D.UINT8), dtype=D.UINT8, perm=[0, 2, 3, 1]), "uint8 is no type"),
    "2 the data of where": (
        one("Where", typed("c", D.BOOL), x(D.INT8), typed("z", D.INT8), dtype=D.INT8),
        "int8 is no type",
    ),
    "2 what cast makes": (one("Cast", x(), dtype=D.INT16, to=int(D.INT16)), "int16 is no type"),
    "2 mish in bfloat16": (one("Mish", x(BF), opset=22, dtype=BF), "bfloat16 is no type that TensorRT's Mish takes"),
    "3 bfloat16 convolution": (conv("Conv", BF, 20), "bfloat16 is no type of it in opset 20, only since 22"),
    "3 bfloat16 instance normalization": (
        one("InstanceNormalization", x(BF), held("s", BF, (4,)), held("b", BF, (4,)), opset=21, dtype=BF),
        "only since 22",
    ),
    "4 float64": (one("Add", x(DOUBLE), typed("z", DOUBLE), dtype=DOUBLE), "float64 is computed in float32"),
    "4 a cast to float64": (one("Cast", x(), dtype=DOUBLE, to=int(DOUBLE)), "float64"),
    "5 cubic": (resize(mode="cubic"), "mode = 'cubic' (expected 'nearest' or 'linear')"),
    "5 antialias": (resize(mode="linear", antialias=1), "antialias = 1"),
    "5 coordinates": (resize(coordinate_transformation_mode="tf_crop_and_resize"), "coordinate_transformation_mode"),
    "5 axes": (
        one("Resize", x(), None, constant("s", np.float32([2, 2])), axes=[2, 3]),
        "axes = [2, 3] (expected all 4, in order)",
    ),
    "5 aspect ratio": (resize(keep_aspect_ratio_policy="not_larger"), "keep_aspect_ratio_policy"),
    "5 dilated pool": (one("MaxPool", x(), kernel_shape=[2, 2], dilations=[2, 2]), "dilations"),
    "5 pool in 1-D": (one("MaxPool", x(shape=(1, 4, 8)), shape=(1, 4, 8), kernel_shape=[2]), "2-D and 3-D"),
    "5 indices of a pool": (one("MaxPool", x(), outputs=2, kernel_shape=[2, 2]), "the output y1 is not supported"),
    "5 mean of a normalization": (
        one("LayerNormalization", x(), held("s", D.FLOAT, (8,)), outputs=2),
        "the output y1 is not supported: only the first is",
    ),
    "5 too many of top-k": (one("TopK", x(), ints("k", 3840), outputs=2), "K = 3840 (expected less than 3840)"),
    "5 unsorted": (one("TopK", x(), ints("k", 2), outputs=2, sorted=0), "sorted = 0"),
    "5 scatter": (
        one("ScatterND", x(), typed("i", D.INT64, (2, 1)), typed("u"), reduction="add"),
        "reduction = 'add' (expected 'none')",
    ),
    "5 grid in 5-D": (one("GridSample", x(shape=(1, 1, 2, 2, 2)), typed("g")), "5 dimensions"),
    "5 unknown size": (dynamic("EyeLike"), "the input's dimensions must be known"),
    "5 text": (one("Constant", value_string="a"), "value_string is not supported"),
    "5 transposed bfloat16 convolution": (conv("ConvTranspose", BF, 22), "no bfloat16 kernel"),
    "6 axes": (one("ReduceMean", x(), typed("a", D.INT64, (1,))), "axes is computed, it must be a constant"),
    "6 axis": (one("CumSum", x(), typed("a", D.INT64, ())), "axis is computed"),
    "7 a zero point": (quantised(3), "the zero point must be 0"),
    "7 a zero point that is not known": (
        one("QuantizeLinear", x(), constant("s", np.float32([1])), held("p", D.INT8, (1,)), dtype=D.INT8),
        "the zero point is not known",
    ),
    "7 a wider scale": (quantised(None, "float32"), "its scale is float32"),
    "8 too new": (one("Abs", x(), opset=25), "opset 25 is not one of 9 to 24"),
    "8 too old": (one("Abs", x(), opset=8), "opset 8"),
    "9 in a branch": (branches(inner("Det")), "Det inner: TensorRT has no such operator"),
    "9 of another rank": (branches(inner("Neg", (8, 8))), "the branches give 2 and 4 dimensions"),
    "9 of one name": (branches(inner("Neg"), rename=False), "both branches call their output a"),
}
NEWEST = (11, 4)
REFUSED_BY_11: dict[str, tuple[ir.Model, str]] = {
    "5 attention in 3-D": (attention((1, 8, 8), q_num_heads=2, kv_num_heads=2), "must have 4 dimensions"),
    "5 softcap": (attention(softcap=3.0), "softcap = 3.0"),
    "5 past": (
        one("Attention", *(typed(n, HALF) for n in "qkvmpr"), opset=23, dtype=HALF, outputs=3),
        "the input 4 is not supported",
    ),
    "5 cache in 3-D": (
        one("TensorScatter", x(shape=(1, 8, 8)), typed("u", shape=(1, 8, 8)), opset=24, shape=(1, 8, 8)),
        "past_cache and update must have 4 dimensions",
    ),
    "9 attention in a branch": (branches(inner("Attention", count=3)), "inside of an If or Loop"),
}


def reported(given: ir.Model, *version: Any) -> str:
    return "\n".join(refusals(given, *version))


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(case: str) -> None:
    given, message = REFUSED[case]
    assert message in reported(given)


@pytest.mark.parametrize("case", REFUSED_BY_11)
def test_what_the_newest_version_refuses(case: str) -> None:
    given, message = REFUSED_BY_11[case]
    assert message in reported(given, NEWEST)


ACCEPTED: dict[str, tuple[ir.Model, tuple[int, ...]]] = {
    "1 attention": (attention(), NEWEST),
    "1 group normalization": (REFUSED["1 group normalization"][0], (10, 15)),
    "1 group normalization of opset 18": (
        one("GroupNormalization", x(), held("s", D.FLOAT, (2,)), held("b", D.FLOAT, (2,)), opset=18, num_groups=2),
        (10, 13),
    ),
    "2 indices": (one("Gather", x(HALF), typed("i", D.INT64, (2,)), dtype=HALF), (10, 13)),
    "2 a condition": (one("Where", typed("c", D.BOOL), x(), typed("z")), (10, 13)),
    "2 pixels": (one("Cast", x(), dtype=D.UINT8, to=int(D.UINT8)), (10, 13)),
    "3 bfloat16 convolution": (conv("Conv", BF, 22), (10, 13)),
    "3 float16 convolution": (conv("Conv", HALF, 20), (10, 13)),
    "3 bfloat16 product": (one("MatMul", x(BF), held("w", BF), dtype=BF), (10, 13)),
    "3 what no opset has, but TensorRT": (one("Einsum", x(BF), dtype=BF, equation="abcd->abcd"), (10, 13)),
    "5 nearest": (
        resize(mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor"),
        (10, 13),
    ),
    "5 unused outputs": (one("LayerNormalization", x(), held("s", D.FLOAT, (8,))), (10, 13)),
    "5 the default of softcap": (attention(softcap=0.0, is_causal=1), NEWEST),
    "5 grid in 5-D": (REFUSED["5 grid in 5-D"][0], (11, 2)),
    "5 undilated": (one("MaxPool", x(), kernel_shape=[2, 2], dilations=[1, 1]), (10, 13)),
    "5 few of top-k": (one("TopK", x(), ints("k", 2)), (10, 13)),
    "6 axes": (one("ReduceMean", x(), ints("a", 1)), (10, 13)),
    "6 no axes": (one("ReduceMean", x()), (10, 13)),
    "7 no zero point": (quantised(None), (10, 13)),
    "7 a narrower scale": (quantised(0, "float16", "float32"), (10, 13)),
    "7 zero": (quantised(0), (10, 13)),
    "8 the newest": (one("Abs", x(), opset=24), (10, 13)),
    "9 branches": (branches(inner("Neg")), (10, 13)),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_is_not_complained_about(case: str) -> None:
    given, version = ACCEPTED[case]
    assert refusals(given, version) == []


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
    legacy = {"ImageScaler", "ParametricSoftplus", "ScaledTanh"}  # of operators.md, long gone from ONNX
    assert set(TAKES) - legacy <= known
    assert set(NOT_THERE.split()) <= known
    assert not set(NOT_THERE.split()) & set(TAKES)


# What we export

MAKERS = {"sd": make_sd, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
EXPORTS = [
    *((family, part.name, "bfloat16") for family in MAKERS for part in MODELS[family].parts(recipe_for(family=family))),
    *((family, "denoiser", "float16") for family in MAKERS),
    ("sd3", "text_encoder_3", "float16"),
    ("sdxl", "text_encoder_2", "float16"),
    ("sdxl", "vae_encoder", "float16"),
    ("sd", "denoiser", "float32"),
    ("sd", "vae_decoder", "float32"),
]
"""bfloat16 meets the most rules. Of the other types a few will do: an export takes seconds."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    made: dict[str, Path] = {}

    def folder(family: str) -> Path:
        if family not in made:
            made[family] = MAKERS[family](tmp_path_factory.mktemp("rules") / family)
        return made[family]

    return folder


@pytest.mark.parametrize(("family", "name", "dtype"), EXPORTS, ids=lambda v: v)
def test_what_we_export_is_accepted(folders: Callable[[str], Path], family: str, name: str, dtype: str) -> None:
    """By the oldest TensorRT, as its backend prepares it.

    The exporter itself writes bfloat16 Conv and InstanceNormalization under opset 20, which has neither.
    """
    recipe = recipe_for(name, family=family, dtype=dtype)
    graph = capture(MODELS[family].component(name), resolve_model(str(folders(family))), recipe, Bucket(1, 64, 64))
    assert refusals(TensorRtBackend().prepare(graph)) == []
    newer = {"Conv", "InstanceNormalization"} & {node.op_type for node in graph.graph}
    assert {line.split()[0] for line in refusals(graph)} == (newer if dtype == "bfloat16" else set())
