"""The numbered cases of `quantize_activations`, and the scales that it is given."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.test_simplify import F32, model, ops, value, weight
from tests.precision.test_weight_only import product, three_convolutions
from toolchain.errors import CalibrationError
from toolchain.graph.parser_rules import refusals
from toolchain.graph.typed import check_types
from toolchain.precision.activations import TINY, activation_scales, quantize_activations, quantized_products
from toolchain.precision.ranges import BINS, Range
from toolchain.precision.weight_only import quantize_weights

LINEAR = {"linear.weight": 0.25}
PAIR = ["QuantizeLinear", "DequantizeLinear"]


def constants(found: ir.Model) -> dict[str, Any]:
    tensors = {name: v.const_value for name, v in found.graph.initializers.items()}
    return {str(n): t.numpy() for n, t in tensors.items() if t is not None and not isinstance(t, ir.ExternalTensor)}


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
    found = quantize_activations(quantize_weights(product(op, shape, dtype=dtype, **attributes), ()), LINEAR)
    assert [o for o in ops(found) if o != "Transpose"] == ["DequantizeLinear", *PAIR, op]
    last = found.graph[-1].inputs[0]
    assert last is not None
    assert (last.dtype, last.shape) == (dtype, found.graph.inputs[0].shape)
    scale = constants(found)["x.scale"]
    assert (float(scale), scale.dtype) == (0.25, dtype.numpy())
    assert constants(found)["zero.int8"].dtype == np.int8
    check_types(found)
    assert refusals(found) == []


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose"])
def test_1_3_a_convolution_beside_others_that_were_left_alone(op: str) -> None:
    made = three_convolutions()
    list(made.graph)[1].op_type = op
    found = quantize_activations(quantize_weights(made, ()), {"body.middle.weight": 0.5})
    assert ops(found) == ["Conv", "DequantizeLinear", *PAIR, op, "Conv"]
    check_types(found)


def test_2_readers_of_one_activation_share_the_largest_scale() -> None:
    x, context = value("x", (4, 64)), value("context", (4, 64))
    weights = [weight(f"to_{name}.weight", (64, 64)) for name in ("q", "k", "v")]
    inputs = (x, x, context)
    nodes = [
        ir.node("MatMul", [source, w], outputs=[value(f"{w.name}.y", (4, 64))])
        for source, w in zip(inputs, weights, strict=True)
    ]
    made = model(nodes, [x, context], [node.outputs[0] for node in nodes], weights)
    scales = {"to_q.weight": 0.25, "to_k.weight": 0.5, "to_v.weight": 0.125}
    found = quantize_activations(quantize_weights(made, ()), scales)
    assert ops(found).count("QuantizeLinear") == 2
    query, key, last = (node for node in found.graph if node.op_type == "MatMul")
    assert query.inputs[0] is key.inputs[0]
    assert query.inputs[0] is not last.inputs[0]
    assert {name: float(v) for name, v in constants(found).items()} == {
        "x.scale": 0.5, "context.scale": 0.125, "zero.int8": 0,
    }  # fmt: skip
    check_types(found)


def test_3_another_reader_of_the_activation_is_left_alone() -> None:
    made = product("MatMul", (64, 128))
    x = made.graph.inputs[0]
    made.graph.append(ir.node("Neg", [x], outputs=[value("z", (4, 64))]))
    found = quantize_activations(quantize_weights(made, ()), LINEAR)
    assert found.graph[-1].inputs[0] is found.graph.inputs[0]
    left = quantize_activations(quantize_weights(made, ["linear"]), {})
    assert ops(left) == ops(made)


def test_4_twice_is_once_and_the_given_graph_stays() -> None:
    made = quantize_weights(product("Gemm", (64, 128)), ())
    before = ir.to_proto(made).SerializeToString()
    once = quantize_activations(made, LINEAR)
    assert ir.to_proto(made).SerializeToString() == before
    assert ir.to_proto(quantize_activations(once, LINEAR)).SerializeToString() == ir.to_proto(once).SerializeToString()


def test_a_scale_that_float16_would_round_to_nothing() -> None:
    made = quantize_weights(product("Gemm", (64, 128), dtype=ir.DataType.FLOAT16), ())
    assert constants(quantize_activations(made, {"linear.weight": 1e-9}))["x.scale"] == TINY


def test_products_are_named_after_their_weights() -> None:
    made = quantize_weights(product("MatMul", (128, 64), flipped=True), ())
    assert [(name, node.op_type) for name, node in quantized_products(made)] == [("linear.weight", "MatMul")]
    assert list(quantized_products(product("MatMul", (64, 128)))) == []


def of(*peaks: float) -> Range:
    """One step, one channel."""
    array = np.array(peaks, np.float32)
    return Range(array.reshape(-1, 1), array, np.zeros(BINS, np.int64))


def test_a_scale_is_the_largest_magnitude_over_127() -> None:
    assert activation_scales({"a": of(127, 254), "b": of(1)}, ["a"], "max") == {"a": 2}
    assert activation_scales({"a": of(127, 254)}, ["a"], "first_steps=0.5") == {"a": 1}


def test_ranges_that_are_of_no_use() -> None:
    ranges = {"nan": of(float("nan")), "zero": of(0), "infinite": of(float("inf")), "good": of(1)}
    with pytest.raises(CalibrationError) as error:
        activation_scales(ranges, ["absent", *ranges], "max")
    assert str(error.value).splitlines()[1:] == [
        "    absent: was not watched",
        "    nan: its input reached nan",
        "    zero: its input was never anything but zero",
        "    infinite: its input reached inf",
        "  hint: calibrate this model again, or name the modules in quantize.exclude",
    ]
    with pytest.raises(CalibrationError, match="and 2 more"):
        activation_scales({}, [str(i) for i in range(10)], "max")
