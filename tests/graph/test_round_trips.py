"""The numbered cases of `drop_round_trips`, and what it is worth to modules kept in float32."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from numpy.typing import NDArray
from onnx.reference import ReferenceEvaluator

from tests.graph.test_simplify import ops
from toolchain.graph.round_trips import MOVES, drop_round_trips
from toolchain.graph.typed import check_types

F32 = NDArray[np.float32]
X = np.float32([[1.0001, 2.0001, 3.0001], [4.0001, 5.0001, 6.0001]])
"""None of them is a float16."""


def graph(body: str, outputs: str = "float[2,3] y", inputs: str = "float[2,3] x") -> ir.Model:
    """From ONNX's own notation; F, H and B in the body are the types float32, float16 and bfloat16."""
    body = body.replace("<F>", "<to=1>").replace("<H>", "<to=10>").replace("<B>", "<to=16>").replace("<D>", "<to=11>")
    text = f'<ir_version: 10, opset_import: ["": 20]> g ({inputs}) => ({outputs}) {{ {body} }}'
    return ir.from_proto(onnx.shape_inference.infer_shapes(onnx.parser.parse_model(text), data_prop=True))


def run(made: ir.Model) -> list[F32]:
    """Rounded where the graph says so: ONNX Runtime drops such casts of its own accord."""
    return [np.asarray(found) for found in ReferenceEvaluator(ir.to_proto(made)).run(None, {"x": X})]


def dropped(made: ir.Model) -> ir.Model:
    found = drop_round_trips(made)
    check_types(found)
    return found


@pytest.mark.parametrize("low", ["H", "B"])
def test_1_a_value_is_not_rounded_on_its_way(low: str) -> None:
    found = dropped(graph(f"h = Cast<{low}>(x) w = Cast<F>(h) y = Neg(w)"))
    assert ops(found) == ["Neg"]
    np.testing.assert_array_equal(run(found)[0], -X)


def test_1_where_it_is_an_output_it_keeps_its_name() -> None:
    found = dropped(graph("n = Neg(x) h = Cast<H>(n) y = Cast<F>(h)"))
    assert ops(found) == ["Neg"]
    assert [v.name for v in found.graph.outputs] == ["y"]
    np.testing.assert_array_equal(run(found)[0], -X)


MOVED = {
    "Transpose": ("m = Transpose<perm=[1,0]>(h)", lambda x: x.T),
    "Reshape": ("s = Constant<value_ints=[6]>() m = Reshape(h, s)", lambda x: x.reshape(6)),
    "Unsqueeze": ("a = Constant<value_ints=[0]>() m = Unsqueeze(h, a)", lambda x: x[None]),
    "Slice": ("b = Constant<value_ints=[1]>() e = Constant<value_ints=[2]>() m = Slice(h, b, e)", lambda x: x[1:2]),
    "Expand": ("s = Constant<value_ints=[2,2,3]>() m = Expand(h, s)", lambda x: np.stack([x, x])),
    "Flatten": ("m = Flatten<axis=0>(h)", lambda x: x.reshape(1, 6)),
    "Squeeze": ("a = Constant<value_ints=[0]>() u = Unsqueeze(h, a) m = Squeeze(u, a)", lambda x: x),
    "Gather": ("i = Constant<value_ints=[1]>() m = Gather(h, i)", lambda x: x[[1]]),
    "Concat": ("m = Concat<axis=0>(h, h)", lambda x: np.concatenate([x, x])),
}


@pytest.mark.parametrize("op_type", MOVED)
def test_2_what_moves_it_moves_float32(op_type: str) -> None:
    body, moved = MOVED[op_type]
    expected = moved(X)
    shape = ",".join(map(str, expected.shape))
    found = dropped(graph(f"h = Cast<H>(x) {body} y = Cast<F>(m)", outputs=f"float[{shape}] y"))
    assert "Cast" not in ops(found)
    np.testing.assert_array_equal(run(found)[0], expected)


def test_2_every_part_of_a_split() -> None:
    found = dropped(
        graph(
            "h = Cast<H>(x) a, b, c = Split<axis=1, num_outputs=3>(h) p = Cast<F>(a) q = Cast<F>(c) y = Sub(p, q)",
            outputs="float[2,1] y",
        )
    )
    assert ops(found) == ["Split", "Sub"]
    np.testing.assert_array_equal(run(found)[0], X[:, :1] - X[:, 2:])


def test_2_all_operators_that_move_are_tried() -> None:
    assert set(MOVED) | {"Split"} == MOVES


def test_3_what_is_joined_must_all_come_from_float32() -> None:
    inputs = "float[2,3] x, float16[2,3] z"
    made = graph("h = Cast<H>(x) m = Concat<axis=0>(h, z) y = Cast<F>(m)", "float[4,3] y", inputs)
    assert ops(dropped(made)) == ["Cast", "Concat", "Cast"]


def test_4_arithmetic_in_between_is_left_alone() -> None:
    found = dropped(graph("h = Cast<H>(x) n = Neg(h) y = Cast<F>(n)"))
    assert ops(found) == ["Cast", "Neg", "Cast"]
    np.testing.assert_array_equal(run(found)[0], -X.astype(np.float16).astype(np.float32))


def test_4_who_else_uses_the_narrow_value_keeps_it() -> None:
    found = dropped(graph("h = Cast<H>(x) y = Cast<F>(h) z = Neg(h)", "float[2,3] y, float16[2,3] z"))
    assert sorted(ops(found)) == ["Cast", "Identity", "Neg"]
    wide, narrow = run(found)
    np.testing.assert_array_equal(wide, X)
    np.testing.assert_array_equal(narrow, -X.astype(np.float16))


def test_4_who_else_uses_what_was_moved_keeps_it() -> None:
    made = graph("h = Cast<H>(x) m = Transpose(h) y = Cast<F>(m) z = Neg(m)", "float[3,2] y, float16[3,2] z")
    for number, node in enumerate(made.graph):
        node.name = f"n{number}"
    found = dropped(made)
    assert sorted(ops(found)) == ["Cast", "Neg", "Transpose", "Transpose"]
    names = [node.name for node in found.graph if node.name]
    assert len(names) == len(set(names))  # ONNX Runtime refuses two nodes of one name
    np.testing.assert_array_equal(run(found)[0], X.T)


@pytest.mark.parametrize(
    ("body", "outputs", "inputs"),
    [
        ("n = Neg(z) y = Cast<F>(n)", "float[2,3] y", "float16[2,3] z"),
        ("h = Cast<H>(x) n = Cast<D>(h) y = Neg(n)", "double[2,3] y", "float[2,3] x"),
        ("h = Cast<H>(z) w = Cast<F>(h) y = Neg(w)", "float[2,3] y", "double[2,3] z"),
        ("h = Cast<to=6>(x) w = Cast<F>(h) y = Neg(w)", "float[2,3] y", "float[2,3] x"),
    ],
)
def test_5_other_casts_are_left_alone(body: str, outputs: str, inputs: str) -> None:
    made = graph(body, outputs, inputs)
    before = ops(made)
    assert ops(drop_round_trips(made)) == before
