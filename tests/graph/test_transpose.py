"""The numbered cases of `transpose_weights`."""

from __future__ import annotations

import onnx_ir as ir

from tests.graph.test_simplify import F32, model, ops, value, weight
from toolchain.graph.transpose import SUFFIX, transpose_weights


def linear(perm: list[int], w: ir.Value, x: ir.Value, name: str = "y") -> list[ir.Node]:
    turned = ir.node("Transpose", [w], {"perm": perm}, outputs=[value(f"{name}_t", (3, 5))])
    return [turned, ir.node("MatMul", [x, turned.outputs[0]], outputs=[value(name, (2, 5))])]


def test_1_a_transposed_weight_becomes_an_initializer() -> None:
    x, w = value("x", (2, 3)), weight("w", (5, 3))
    nodes = linear([1, 0], w, x)
    found = transpose_weights(model(nodes, [x], [nodes[-1].outputs[0]], [w]))
    assert ops(found) == ["MatMul"]
    assert list(found.graph.initializers) == ["w" + SUFFIX]
    tensor = found.graph.initializers["w" + SUFFIX].const_value
    assert tensor is not None
    assert list(tensor.shape) == [3, 5]
    assert tensor.dtype == F32


def test_1_two_readers_share_one_transposed_weight() -> None:
    x, w = value("x", (2, 3)), weight("w", (5, 3))
    first, second = linear([1, 0], w, x, "a"), linear([1, 0], w, x, "b")
    outputs = [first[-1].outputs[0], second[-1].outputs[0]]
    found = transpose_weights(model(first + second, [x], outputs, [w]))
    assert ops(found) == ["MatMul", "MatMul"]
    assert list(found.graph.initializers) == ["w" + SUFFIX]


def test_2_a_weight_that_is_read_both_ways_keeps_its_copy() -> None:
    x, w = value("x", (2, 3)), weight("w", (5, 3))
    nodes = linear([1, 0], w, x)
    plain = ir.node("Neg", [w], outputs=[value("z", (5, 3))])
    found = transpose_weights(model([*nodes, plain], [x], [nodes[-1].outputs[0], plain.outputs[0]], [w]))
    assert sorted(found.graph.initializers) == ["w", "w" + SUFFIX]


def test_3_other_transposes_are_left_alone() -> None:
    x, w = value("x", (2, 3)), weight("w", (5, 3, 1))
    turned = ir.node("Transpose", [w], {"perm": [1, 0, 2]}, outputs=[value("t", (3, 5, 1))])
    moved = ir.node("Transpose", [x], {"perm": [1, 0]}, outputs=[value("u", (3, 2))])
    found = transpose_weights(model([turned, moved], [x], [turned.outputs[0], moved.outputs[0]], [w]))
    assert ops(found) == ["Transpose", "Transpose"]
    assert list(found.graph.initializers) == ["w"]
