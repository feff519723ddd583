"""Products in int8 on ONNX Runtime: the numbered cases, what its kernels compute, and which operators are run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.test_simplify import model, ops, value, weight
from tests.precision.test_engines import BUILDER, run
from tests.precision.test_weight_only import product
from toolchain.engines import cpu
from toolchain.engines.onnxruntime.integer import OFFSET, as_products
from toolchain.engines.onnxruntime.integer_kernels import fuse_integer_products
from toolchain.graph.placeholder import placeholder
from toolchain.graph.typed import check_types
from toolchain.precision.activations import quantize_activations
from toolchain.precision.changes import Changes
from toolchain.precision.rounding import channel_scales, quantize
from toolchain.precision.stored import Stored
from toolchain.precision.weight_only import quantize_weights
from toolchain.recipe import Quantize
from toolchain.weights.derived import weight_uses

F32 = np.dtype(np.float32)
SCALE = 4 / 127
KERNEL = "MatMulIntegerToFloat"


def convolution(x: tuple[int, ...], w: tuple[int, ...], y: tuple[int, ...], **attributes: Any) -> ir.Model:
    """Between two 1x1 convolutions, which stay in float as the first and the last."""
    source, bias = value("x", x), weight("body.bias", (w[0],))
    names = ("first", "body", "last")
    shapes = {"first": (x[1], x[1], 1, 1), "body": w, "last": (y[1], y[1], 1, 1)}
    outputs = {"first": x, "body": y, "last": y}
    weights = [weight(f"{name}.weight", shapes[name]) for name in names]
    nodes: list[ir.Node] = []
    for name, one in zip(names, weights, strict=True):
        inputs = [nodes[-1].outputs[0] if nodes else source, one]
        inputs += [bias] if name == "body" else []
        kept = attributes if name == "body" else {}
        nodes.append(ir.node("Conv", inputs, kept, outputs=[value(f"{name}.y", outputs[name])], name=name))
    return model(nodes, [source], [nodes[-1].outputs[0]], [*weights, bias])


def in_int8(made: ir.Model) -> ir.Model:
    """As a build makes it of an exported graph."""
    quantized = quantize_weights(BUILDER.prepare(made), ())
    return BUILDER.finish(quantize_activations(quantized, smooth=False))


def scaled(name: str) -> Changes:
    return Changes({f"{name}.weight.input.scales": np.array(SCALE, F32)})


def integers(x: np.ndarray) -> np.ndarray:
    steps: np.ndarray = np.clip(np.rint(x / np.float32(SCALE)), -128, 127).astype(np.int64)
    return steps


def rows(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    scales = channel_scales(w, 0, "max", F32)
    return quantize(w, scales, 0).astype(np.int64), scales


CONVOLUTIONS = [
    pytest.param(
        (2, 32, 8, 8), (16, 32, 3, 3), (2, 16, 8, 8), {"pads": [1, 1, 1, 1], "auto_pad": "NOTSET"}, id="padded"
    ),
    pytest.param((1, 64, 5, 7), (80, 64, 1, 1), (1, 80, 5, 7), {}, id="1x1"),
    pytest.param((1, 64, 5, 7), (80, 64, 1, 1), (1, 80, 3, 4), {"strides": [2, 2]}, id="1x1 of every second"),
    pytest.param((1, 32, 8, 9), (16, 32, 3, 3), (1, 16, 4, 4), {"strides": [2, 2], "pads": [0, 0, 1, 1]}, id="strides"),
    pytest.param((1, 32, 9, 9), (32, 32, 3, 2), (1, 32, 5, 7), {"dilations": [2, 2]}, id="dilations"),
    pytest.param((1, 32, 6, 7), (32, 32, 2, 3), (1, 32, 7, 6), {"pads": [1, 0, 1, 1]}, id="uneven"),
]


@pytest.mark.parametrize(("x", "w", "y", "attributes"), CONVOLUTIONS)
@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_2_a_convolution_computes_with_integers(
    level: str, x: Any, w: Any, y: Any, attributes: dict[str, Any], tmp_path: Path
) -> None:
    """Equal to sums of integers, which torch makes in float64, but for the last bits of their scale."""
    import torch

    generator = np.random.default_rng(0)
    weights = {
        "first.weight": np.eye(x[1], dtype=F32)[..., None, None],
        "body.weight": generator.standard_normal(w).astype(F32),
        "last.weight": np.eye(y[1], dtype=F32)[..., None, None],
        "body.bias": generator.standard_normal(w[0]).astype(F32),
    }
    graph = in_int8(convolution(x, w, y, **attributes))
    check_types(graph)
    data = generator.standard_normal(x).astype(F32)
    found, _ = run(tmp_path, graph, weights, data, level, scaled("body"))
    steps, scales = rows(weights["body.weight"])
    before, (top, left, bottom, right) = torch.from_numpy(integers(data)), attributes.get("pads", [0] * 4)
    before = torch.nn.functional.pad(before.double(), (left, right, top, bottom))
    kept = {"stride": attributes.get("strides", 1), "dilation": attributes.get("dilations", 1)}
    sums = torch.nn.functional.conv2d(before, torch.from_numpy(steps).double(), **kept).numpy()
    column = (1, -1, 1, 1)
    expected = sums * (scales * np.float32(SCALE)).reshape(column) + weights["body.bias"].reshape(column)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert executed(tmp_path)[KERNEL] == (level != "basic")


@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("MatMul", (64, 128), {}),
        ("MatMul", (128, 64), {"flipped": True}),
        ("Gemm", (64, 128), {}),
        ("Gemm", (128, 64), {"transB": 1}),
    ],
)
@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_3_a_product_computes_with_integers(
    level: str, op: str, shape: tuple[int, int], attributes: dict[str, Any], tmp_path: Path
) -> None:
    generator = np.random.default_rng(0)
    made = product(op, shape, **attributes)
    bias = weight("linear.bias", (128,))
    made.graph.register_initializer(bias)
    last = made.graph[-1]
    if op == "Gemm":
        last.resize_inputs(3)
        last.replace_input_with(2, bias)
    else:
        added = ir.node("Add", [last.outputs[0], bias], outputs=[value("sum", (4, 128))])
        made.graph.append(added)
        made.graph.outputs[0] = added.outputs[0]
    kernel, offsets = generator.standard_normal(shape).astype(F32), generator.standard_normal(128).astype(F32)
    data = generator.standard_normal((4, 64)).astype(F32)
    graph = in_int8(made)
    found, _ = run(tmp_path, graph, {"linear.weight": kernel, "linear.bias": offsets}, data, level, scaled("linear"))
    steps, scales = rows(kernel if shape == (128, 64) else kernel.T)
    expected = (integers(data) @ steps.T) * (scales * np.float32(SCALE)) + offsets
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    assert executed(tmp_path) == ({"QuantizeLinear": 1, KERNEL: 1} if level != "basic" else executed(tmp_path))


def executed(folder: Path) -> dict[str, int]:
    """How often an engine runs each operator."""
    names = [node.op_type for node in ir.load(folder / "engine" / "graph.onnx").graph]
    return {KERNEL: 0} | {name: names.count(name) for name in names}


def test_1_activations_are_shifted_to_uint8() -> None:
    found = in_int8(product("MatMul", (64, 128)))
    pair = [node for node in found.graph if len(node.inputs) == 3]
    assert [node.op_type for node in pair] == ["QuantizeLinear", "DequantizeLinear"]
    zeros = {node.inputs[2] for node in pair}
    (zero,) = zeros
    assert zero is not None
    assert zero.const_value is not None
    assert (zero.dtype, zero.const_value.numpy()) == (ir.DataType.UINT8, OFFSET)
    assert pair[0].outputs[0].dtype == ir.DataType.UINT8


def test_2_3_weights_are_stored_the_other_way_round() -> None:
    made = in_int8(convolution((1, 64, 4, 4), (96, 64, 3, 2), (1, 96, 2, 3)))
    (use,) = (use for use in weight_uses(made) if use.stored is not None)
    stored = Stored("int8", (2, 3, 64, 96), 3)
    assert (use.name, use.key, use.stored, use.transposed) == ("body.weight.transposed", "body.weight", stored, True)
    assert "body.weight.int8" not in made.graph.initializers


def left(made: ir.Model) -> list[str]:
    made = in_int8(made)
    assert fuse_integer_products(made).opset_imports.keys() == {""}
    return [op for op in ops(made) if op not in ("QuantizeLinear", "DequantizeLinear")]


def test_4_what_stays() -> None:
    transposed = convolution((1, 32, 4, 4), (32, 32, 3, 3), (1, 32, 4, 4), pads=[1, 1, 1, 1])
    list(transposed.graph)[1].op_type = "ConvTranspose"
    assert left(transposed) == ["Conv", "ConvTranspose", "Conv"]
    grouped = convolution((1, 64, 4, 4), (64, 32, 3, 3), (1, 64, 4, 4), pads=[1, 1, 1, 1], group=2)
    assert left(grouped) == ["Conv"] * 3
    alike = convolution((1, 32, 4, 4), (32, 32, 3, 3), (1, 32, 4, 4), auto_pad="SAME_UPPER")
    assert left(alike) == ["Conv"] * 3
    assert left(product("Gemm", (64, 128), alpha=0.5)) == ["Gemm"]
    assert left(product("MatMul", (64, 128), dtype=ir.DataType.FLOAT16)) == ["MatMul"]
    halves = product("Gemm", (64, 128), dtype=ir.DataType.FLOAT16)
    assert left(halves) == ["Gemm"]


@pytest.mark.parametrize(
    ("flags", "machine", "saturates"),
    [
        ("avx2 avx512f avx512_vnni", "x86_64", False),
        ("avx2 avx_vnni", "AMD64", False),
        ("avx2 avx512f", "x86_64", True),
        ("", "aarch64", False),
    ],
)
def test_a_cpu_whose_sums_saturate_is_warned_of(
    flags: str, machine: str, saturates: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cpu, "cpu_flags", lambda: frozenset(flags.split()))
    monkeypatch.setattr("platform.machine", lambda: machine)
    said = BUILDER.warning(Quantize("int8", activations="int8"))
    assert (said is not None and "no VNNI" in said) is saturates
    assert BUILDER.warning(Quantize("int8")) is None


def test_weights_alone_stay_in_float() -> None:
    made = quantize_weights(BUILDER.prepare(product("MatMul", (64, 128))), ())
    assert ops(fuse_integer_products(as_products(made))) == ["DequantizeLinear", "MatMul"]


def test_an_add_of_something_else_stays_behind_the_product() -> None:
    made = product("MatMul", (64, 128))
    last = made.graph[-1].outputs[0]
    row = ir.Value(name="row", shape=ir.Shape((1, 128)), type=ir.TensorType(ir.DataType.FLOAT))
    row.const_value = placeholder("row", ir.DataType.FLOAT, (1, 128))
    made.graph.register_initializer(row)
    added = ir.node("Add", [last, row], outputs=[value("sum", (4, 128))])
    made.graph.append(added)
    made.graph.outputs[0] = added.outputs[0]
    found = fuse_integer_products(in_int8(made))
    assert [op for op in ops(found) if op not in ("Constant", "Reshape")] == ["QuantizeLinear", KERNEL, "Add"]


def test_the_given_graphs_stay() -> None:
    made = quantize_activations(quantize_weights(product("Gemm", (64, 128)), ()), smooth=False)
    before = ir.to_proto(made).SerializeToString()
    products = as_products(made)
    assert ir.to_proto(made).SerializeToString() == before
    before = ir.to_proto(products).SerializeToString()
    fuse_integer_products(products)
    assert ir.to_proto(products).SerializeToString() == before
