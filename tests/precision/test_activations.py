"""The numbered cases of `quantize_activations`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from tests.graph.test_simplify import F32, model, ops, value, weight
from tests.precision.test_weight_only import initializers, product, three_convolutions
from toolchain.graph.parser_rules import refusals
from toolchain.graph.typed import check_types
from toolchain.precision.activations import quantize_activations, quantized_products, rounded_activations
from toolchain.precision.stored import Form
from toolchain.precision.weight_only import INT8, quantize_weights

PAIR = ["QuantizeLinear", "DequantizeLinear"]


def added(found: ir.Model) -> dict[str, tuple[str, list[Any]]]:
    """The placeholders of a graph that are neither a weight nor its scales."""
    return {name: kind for name, kind in initializers(found).items() if ".input." in name}


def rounded(made: ir.Model, form: Form = INT8, *, smooth: bool = False) -> ir.Model:
    return quantize_activations(quantize_weights(made, (), form), smooth=smooth)


@pytest.mark.parametrize("dtype", [F32, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("MatMul", (64, 128), {}),
        ("MatMul", (128, 64), {"flipped": True}),
        ("Gemm", (64, 128), {}),
        ("Gemm", (128, 64), {"transB": 1}),
    ],
)
def test_1_a_product_reads_its_input_through_a_pair(
    op: str, shape: tuple[int, int], attributes: dict[str, Any], dtype: ir.DataType
) -> None:
    found = rounded(product(op, shape, dtype=dtype, **attributes))
    assert [o for o in ops(found) if o != "Transpose"] == ["DequantizeLinear", *PAIR, op]
    last = found.graph[-1].inputs[0]
    assert last is not None
    assert (last.dtype, last.shape) == (dtype, found.graph.inputs[0].shape)
    assert added(found) == {"linear.weight.input.scales": (dtype.name, [])}
    assert initializers(found)["zero.int8"] == ("INT8", [])
    check_types(found)
    assert refusals(found) == []


def test_1_beside_a_weight_in_float8_it_is_float8() -> None:
    found = rounded(product("MatMul", (64, 128)), Form("float8"))
    assert ops(found) == ["DequantizeLinear", *PAIR, "MatMul"]
    assert initializers(found)["zero.float8"] == ("FLOAT8E4M3FN", [])
    (narrow,) = (node for node in found.graph if node.op_type == "QuantizeLinear")
    assert narrow.outputs[0].dtype == ir.DataType.FLOAT8E4M3FN
    weights_alone = quantize_weights(product("MatMul", (64, 128)), (), Form("float8"))
    (activation,) = rounded_activations(weights_alone, smooth=False)
    assert activation.bits == "float8"
    check_types(found)
    assert refusals(found) == []


def test_beside_a_weight_in_int4_nothing_is_rounded() -> None:
    assert "QuantizeLinear" not in ops(rounded(product("MatMul", (64, 128)), Form("int4", 32)))


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_1_3_a_convolution_beside_others_that_were_left_alone(op: str) -> None:
    made = three_convolutions()
    list(made.graph)[1].op_type = op
    found = rounded(made, smooth=True)  # of which a convolution has none
    assert added(found) == {"body.middle.weight.input.scales": ("FLOAT", [])}
    assert ops(found) == ["Conv", "DequantizeLinear", *PAIR, op, "Conv"]
    check_types(found)


def projections() -> ir.Model:
    """To query and key of x, and to value of a context."""
    x, context = value("x", (4, 64)), value("context", (4, 64))
    weights = [weight(f"to_{name}.weight", (64, 64)) for name in ("q", "k", "v")]
    inputs = (x, x, context)
    nodes = [
        ir.node("MatMul", [source, w], outputs=[value(f"{w.name}.y", (4, 64))])
        for source, w in zip(inputs, weights, strict=True)
    ]
    return model(nodes, [x, context], [node.outputs[0] for node in nodes], weights)


def test_2_readers_of_one_activation_share_its_pair() -> None:
    found = rounded(projections())
    assert ops(found).count("QuantizeLinear") == 2
    query, key, last = (node for node in found.graph if node.op_type == "MatMul")
    assert query.inputs[0] is key.inputs[0]
    assert query.inputs[0] is not last.inputs[0]
    assert added(found).keys() == {"to_k.weight.input.scales", "to_v.weight.input.scales"}
    weights = quantize_weights(projections(), ())
    assert [r.weights for r in rounded_activations(weights, smooth=False)] == [
        ("to_k.weight", "to_q.weight"),
        ("to_v.weight",),
    ]
    check_types(found)


def test_3_another_reader_of_the_activation_is_left_alone() -> None:
    made = product("MatMul", (64, 128))
    x = made.graph.inputs[0]
    made.graph.append(ir.node("Neg", [x], outputs=[value("z", (4, 64))]))
    found = rounded(made, smooth=True)
    assert found.graph[-1].inputs[0] is found.graph.inputs[0]
    left = quantize_activations(quantize_weights(made, ["linear"]), smooth=True)
    assert ops(left) == ops(made)


@pytest.mark.parametrize("smooth", [False, True])
def test_4_twice_is_once_and_the_given_graph_stays(smooth: bool) -> None:
    made = quantize_weights(product("Gemm", (64, 128)), ())
    before = ir.to_proto(made).SerializeToString()
    once = quantize_activations(made, smooth=smooth)
    assert ir.to_proto(made).SerializeToString() == before
    twice = quantize_activations(once, smooth=smooth)
    assert ir.to_proto(twice).SerializeToString() == ir.to_proto(once).SerializeToString()


def test_4_a_constant_is_left_alone() -> None:
    made = product("MatMul", (64, 128))
    table = weight("table", (4, 64))
    made.graph.register_initializer(table)
    made.graph[0].replace_input_with(0, table)
    assert "QuantizeLinear" not in ops(rounded(made))


def test_5_an_input_without_a_norm_is_multiplied() -> None:
    found = rounded(projections(), smooth=True)
    expected = "Mul QuantizeLinear MatMul MatMul Mul QuantizeLinear MatMul"
    assert [op for op in ops(found) if op != "DequantizeLinear"] == expected.split()
    assert added(found) == {
        "to_k.weight.input.factors": ("FLOAT", [64]),
        "to_k.weight.input.scales": ("FLOAT", []),
        "to_v.weight.input.factors": ("FLOAT", [64]),
        "to_v.weight.input.scales": ("FLOAT", []),
    }
    check_types(found)


def normed(norm: str, *names: str, also: bool = False) -> ir.Model:
    """A product of a norm with weights of these names. also: the norm is read elsewhere too."""
    x, w = value("x", (4, 64)), weight("linear.weight", (64, 64))
    weights = [weight(name, (64,)) for name in names]
    first = ir.node(norm, [x, *weights], outputs=[value("normed", (4, 64))])
    nodes = [first, ir.node("MatMul", [first.outputs[0], w], outputs=[value("y", (4, 64))])]
    nodes += [ir.node("Neg", first.outputs, outputs=[value("z", (4, 64))])] if also else []
    return model(nodes, [x], [node.outputs[0] for node in nodes[1:]], [w, *weights])


@pytest.mark.parametrize(
    ("made", "norm"),
    [
        (normed("LayerNormalization", "norm.weight", "norm.bias"), ("norm.weight", "norm.bias")),
        (normed("Mul", "norm.weight"), ("norm.weight",)),
        (normed("LayerNormalization", "norm.weight", also=True), ()),
        (normed("Add", "norm.weight"), ()),
    ],
)
def test_5_a_norm_before_it_has_the_factors_in_its_weights(made: ir.Model, norm: tuple[str, ...]) -> None:
    (activation,) = rounded_activations(quantize_weights(made, ()), smooth=True)
    assert activation.norm == norm
    assert activation.smoothing == ("folded" if norm else "multiplied")
    found = rounded(made, smooth=True)
    assert ops(found).count("Mul") == ops(made).count("Mul") + (not norm)
    assert ("linear.weight.input.factors" in added(found)) is not bool(norm)
    check_types(found)


def test_products_are_named_after_their_weights() -> None:
    made = quantize_weights(product("MatMul", (128, 64), flipped=True), ())
    assert [(name, node.op_type) for name, node in quantized_products(made, "int8")] == [("linear.weight", "MatMul")]
    assert list(quantized_products(made, "float8")) == []
    assert list(quantized_products(product("MatMul", (64, 128)), "int8")) == []
