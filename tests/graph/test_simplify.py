"""The numbered cases of `simplify`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from toolchain.graph.placeholder import is_weight, placeholder
from toolchain.graph.simplify import simplify

F32 = ir.DataType.FLOAT


def value(name: str, shape: Sequence[int], dtype: ir.DataType = F32) -> ir.Value:
    return ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def weight(name: str, shape: tuple[int, ...]) -> ir.Value:
    found = value(name, shape)
    found.const_value = placeholder(name, F32, shape)
    return found


def constant(name: str, array: Any) -> ir.Value:
    tensor = ir.tensor(np.asarray(array), name=name)
    return ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)


def model(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], weights: list[ir.Value]) -> ir.Model:
    graph = ir.Graph(inputs, outputs, nodes=nodes, initializers=weights, opset_imports={"": 20}, name="test")
    return ir.Model(graph, ir_version=10)


def ops(found: ir.Model) -> list[str]:
    return [node.op_type for node in found.graph]


def test_2_a_node_fed_by_constants_is_folded() -> None:
    x, two, three = value("x", (2,)), constant("two", np.float32([2, 2])), constant("three", np.float32([3, 3]))
    total = ir.node("Add", [two, three], outputs=[value("sum", (2,))])
    out = ir.node("Mul", [x, total.outputs[0]], outputs=[value("y", (2,))])
    found = simplify(model([total, out], [x], [out.outputs[0]], [two, three]))
    assert ops(found) == ["Mul"]


def test_3_a_node_fed_by_a_weight_is_left_alone() -> None:
    x, w, two = value("x", (2,)), weight("w", (2,)), constant("two", np.float32([2, 2]))
    scaled = ir.node("Mul", [w, two], outputs=[value("scaled", (2,))])
    out = ir.node("Add", [x, scaled.outputs[0]], outputs=[value("y", (2,))])
    found = simplify(model([scaled, out], [x], [out.outputs[0]], [w, two]))
    assert ops(found) == ["Mul", "Add"]
    assert is_weight(found.graph.initializers["w"])


def test_4_unused_and_equal_nodes_go() -> None:
    x, unused = value("x", (2,)), weight("unused", (2,))
    dead = ir.node("Neg", [x], outputs=[value("dead", (2,))])
    first = ir.node("Abs", [x], outputs=[value("first", (2,))])
    second = ir.node("Abs", [x], outputs=[value("second", (2,))])
    out = ir.node("Add", [first.outputs[0], second.outputs[0]], outputs=[value("y", (2,))])
    found = simplify(model([dead, first, second, out], [x], [out.outputs[0]], [unused]))
    assert ops(found) == ["Abs", "Add"]
    assert "unused" not in found.graph.initializers


def test_the_given_model_is_not_changed() -> None:
    x = value("x", (2,))
    dead = ir.node("Neg", [x], outputs=[value("dead", (2,))])
    out = ir.node("Abs", [x], outputs=[value("y", (2,))])
    given = model([dead, out], [x], [out.outputs[0]], [])
    simplify(given)
    assert ops(given) == ["Neg", "Abs"]
