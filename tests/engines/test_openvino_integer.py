"""The numbered cases of `in_float32`."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from tests.graph.test_simplify import F32, model, ops, value
from tests.precision.test_activations import rounded
from tests.precision.test_weight_only import product
from toolchain.engines.openvino.integer import in_float32
from toolchain.graph.placeholder import placeholder
from toolchain.graph.typed import check_types
from toolchain.precision.weight_only import quantize_weights

BF16 = ir.DataType.BFLOAT16


def types(found: ir.Model) -> dict[str, set[ir.DataType | None]]:
    """Operator -> the types of its results."""
    kinds: dict[str, set[ir.DataType | None]] = {}
    for node in found.graph:
        kinds.setdefault(node.op_type, set()).add(node.outputs[0].dtype)
    return kinds


def scaled(*, constant: bool = True, reads: int = 1) -> ir.Model:
    """A rounded product in bfloat16, then a Mul and an Add, with constants or with values."""
    found = rounded(product("MatMul", (64, 128), dtype=BF16))
    graph = found.graph
    others = [value(name, (1, 128), BF16) for name in ("scale", "shift")]
    for other in others:
        if constant:
            other.const_value = placeholder(str(other.name), BF16, (1, 128))
            graph.register_initializer(other)
        else:
            graph.inputs.append(other)
    mul = ir.node("Mul", [graph.outputs[0], others[0]], outputs=[value("scaled", (4, 128), BF16)])
    add = ir.node("Add", [mul.outputs[0], others[1]], outputs=[value("shifted", (4, 128), BF16)])
    graph.extend([mul, add])
    graph.outputs[:] = [add.outputs[0], *([mul.outputs[0]] if reads > 1 else [])]
    return found


@pytest.mark.parametrize(("shape", "flipped"), [((64, 128), False), ((128, 64), True)])
def test_1_a_rounded_product_is_in_float32(shape: tuple[int, int], flipped: bool) -> None:
    made = rounded(product("MatMul", shape, flipped=flipped, dtype=BF16))
    before = ops(made)
    found = in_float32(made)
    kinds = types(found)
    assert kinds["MatMul"] == kinds["DequantizeLinear"] == {F32}
    assert kinds.get("Transpose", {F32}) == {F32}
    assert found.graph.outputs[0].dtype == BF16
    assert ops(found)[-2:] == ["MatMul", "Cast"]
    check_types(found)
    assert ops(made) == before  # the given graph is not changed
    assert ops(in_float32(found)) == ops(found)


def test_2_scaling_by_constants_is_in_float32() -> None:
    found = in_float32(scaled())
    kinds = types(found)
    assert kinds["Mul"] == kinds["Add"] == {F32}
    assert found.graph.outputs[0].dtype == BF16
    check_types(found)


@pytest.mark.parametrize("made", [scaled(constant=False), scaled(reads=2)])
def test_2_other_sums_are_left_alone(made: ir.Model) -> None:
    kinds = types(in_float32(made))
    assert kinds["Mul"] == kinds["Add"] == {BF16}


@pytest.mark.parametrize(
    "made",
    [
        rounded(product("MatMul", (64, 128))),
        quantize_weights(product("MatMul", (64, 128), dtype=BF16), ()),
        product("MatMul", (64, 128), dtype=BF16),
    ],
)
def test_3_what_rounds_nothing_in_bfloat16_is_left_alone(made: ir.Model) -> None:
    assert ops(in_float32(made)) == ops(made)
    assert types(in_float32(made)) == types(made)


def test_a_model_without_nodes() -> None:
    x = value("x", (1,))
    assert ops(in_float32(model([], [x], [x], []))) == []
