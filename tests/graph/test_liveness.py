"""The numbered cases of `peak_bytes`, each with its peak counted by hand. A tensor [n] of float32 has 4 n bytes."""

from __future__ import annotations

from itertools import pairwise

import onnx_ir as ir
import pytest

from tests.graph.test_simplify import model, value, weight
from toolchain.graph.liveness import declared, facts, peak_bytes


def chain(op: str, *sizes: int) -> tuple[list[ir.Value], list[ir.Node]]:
    """x -> op -> op ... : its tensors, the first of which is the input and the last the output."""
    tensors = [value(f"v{i}", (n,)) for i, n in enumerate(sizes)]
    nodes = [ir.node(op, [a], outputs=[b]) for a, b in pairwise(tensors)]
    return tensors, nodes


def peak(nodes: list[ir.Node], inputs: list[ir.Value], outputs: list[ir.Value], *weights: ir.Value) -> int:
    return peak_bytes(list(model(nodes, inputs, outputs, list(weights)).graph), declared)


def test_1_inputs_outputs_and_weights_are_the_callers() -> None:
    x, y, w = value("x", (100,)), value("y", (100,)), weight("w", (100,))
    assert peak([ir.node("Add", [x, w], outputs=[y])], [x], [y], w) == 0


def test_1_a_view_is_no_tensor_of_its_own_and_keeps_what_it_shows() -> None:
    x, a, shape, view, b, y = (value(n, (10,)) for n in ("x", "a", "shape", "view", "b", "y"))
    nodes = [
        ir.node("Neg", [x], outputs=[a]),
        ir.node("Reshape", [a, shape], outputs=[view]),
        ir.node("Exp", [x], outputs=[b]),
        ir.node("Add", [view, b], outputs=[y]),
    ]
    assert peak(nodes, [x, shape], [y]) == 4 * (10 + 10)


def test_2_in_a_chain_two_neighbours_live_at_once() -> None:
    tensors, nodes = chain("Neg", 1, 10, 30, 20, 1)
    assert peak(nodes, tensors[:1], tensors[-1:]) == 4 * (30 + 20)


def test_2_a_skip_connection_lives_until_it_is_read() -> None:
    x, skip, a, b, y = (value(n, (size,)) for n, size in (("x", 1), ("skip", 7), ("a", 30), ("b", 20), ("y", 1)))
    nodes = [
        ir.node("Neg", [x], outputs=[skip]),
        ir.node("Neg", [skip], outputs=[a]),
        ir.node("Neg", [a], outputs=[b]),
        ir.node("Concat", [skip, b], {"axis": 0}, outputs=[y]),
    ]
    assert peak(nodes, [x], [y]) == 4 * (7 + 30 + 20)


def test_2_what_nobody_reads_lives_while_its_node_runs() -> None:
    x, kept, unused, a, y = (value(n, (s,)) for n, s in (("x", 1), ("k", 5), ("unused", 40), ("a", 30), ("y", 1)))
    nodes = [
        ir.node("TopK", [x], outputs=[kept, unused]),
        ir.node("Neg", [kept], outputs=[a]),
        ir.node("Neg", [a], outputs=[y]),
    ]
    assert peak(nodes, [x], [y]) == 4 * (5 + 40)


def residual(op: str, *, sides: tuple[int, int] = (10, 10), again: bool = False) -> int:
    """The peak of y = -op(a, b) where `a` and `b` are as long as `sides`; `again` reads both once more, later."""
    x, a, b = value("x", (1,)), value("a", (sides[0],)), value("b", (sides[1],))
    both, y = value("both", (10,)), value("y", (1,))
    last = [both, a, b] if again else [both]
    nodes = [
        ir.node("Neg", [x], outputs=[a]),
        ir.node("Exp", [x], outputs=[b]),
        ir.node(op, [a, b], outputs=[both]),
        ir.node("Concat", last, {"axis": 0}, outputs=[y]),
    ]
    return peak(nodes, [x], [y])


def test_3_a_sum_takes_the_place_of_what_it_adds() -> None:
    assert residual("Add") == 4 * 20


def test_3_a_product_of_matrices_does_not() -> None:
    assert residual("MatMul") == 4 * 30


def test_3_nor_does_a_sum_whose_inputs_are_read_later() -> None:
    assert residual("Add", again=True) == 4 * 30


def test_3_nor_one_of_another_shape() -> None:
    assert residual("Add", sides=(1, 10)) == 4 * 11  # in place of the second
    assert residual("Add", sides=(1, 1)) == 4 * 12


@pytest.mark.parametrize(("domain", "expected"), [("com.microsoft.nchwc", 20), ("", 30)])
def test_3_an_operator_of_another_domain_has_rules_of_its_own(domain: str, expected: int) -> None:
    x, w, a, b, both, y = (value(n, (10,)) for n in ("x", "w", "a", "b", "both", "y"))
    nodes = [
        ir.node("Neg", [x], outputs=[a]),
        ir.node("Exp", [x], outputs=[b]),
        ir.node("Conv", [a, w, None, b], domain=domain, outputs=[both]),
        ir.node("Neg", [both], outputs=[y]),
    ]
    assert peak(nodes, [x, w], [y]) == 4 * expected


def test_4_a_dead_tensors_place_waits_for_one_of_its_shape() -> None:
    tensors, nodes = chain("Neg", 1, 10, 20, 30, 10, 1)
    assert peak(nodes, tensors[:1], tensors[-1:]) == 4 * (10 + 20 + 30)
    tensors, nodes = chain("Neg", 1, 10, 20, 30, 11, 1)
    assert peak(nodes, tensors[:1], tensors[-1:]) == 4 * (20 + 30)


def test_facts_of_an_export() -> None:
    tensors, nodes = chain("Neg", 1, 10, 30, 1)
    w = weight("w", (5, 3))
    found = model([*nodes, ir.node("Neg", [w], outputs=[value("z", (5, 3))])], tensors[:1], [tensors[-1]], [w])
    assert facts(found) == {"weight_bytes": 4 * 15, "activation_bytes": 4 * 40}


def test_without_a_shape_nothing_is_said() -> None:
    tensors, nodes = chain("Neg", 1, 10, 30, 1)
    tensors[1].shape = None
    found = model(nodes, tensors[:1], tensors[-1:], [])
    assert facts(found) == {"weight_bytes": 0, "activation_bytes": None}
    with pytest.raises(LookupError, match="v1"):
        peak_bytes(list(found.graph), declared)
    tensors[1].shape = ir.Shape(["n"])
    assert facts(found)["activation_bytes"] is None
