"""The numbered cases of `transpose_einsums`."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.test_profiles import model, run
from tests.graph.test_simplify import value
from toolchain.graph.einsum import transpose_einsums


def einsum(equation: str, *shapes: tuple[int, ...]) -> ir.Model:
    inputs = [value(f"x{i}", shape) for i, shape in enumerate(shapes)]
    found = np.einsum(equation.replace(" ", ""), *(np.zeros(shape) for shape in shapes)).shape
    y = value("y", found)
    return model([ir.node("Einsum", inputs, {"equation": equation}, outputs=[y], name="turn")], inputs, [y])


@pytest.mark.parametrize(
    ("equation", "shape"), [("nhwpqc->nchpwq", (2, 3, 4, 2, 2, 5)), ("ab -> ba", (2, 3)), ("abc->abc", (1, 2, 3))]
)
def test_1_a_permutation_is_a_transpose(equation: str, shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    (expected,) = run(einsum(equation, shape), x0=x)
    made = transpose_einsums(einsum(equation, shape))
    assert [node.op_type for node in made.graph] == ["Transpose"]
    np.testing.assert_array_equal(run(made, x0=x)[0], expected)


@pytest.mark.parametrize(
    ("equation", "shapes"),
    [("ab->a", ((2, 3),)), ("aa->a", ((2, 2),)), ("ab", ((2, 3),)), ("ab,bc->ac", ((2, 3), (3, 2)))],
)
def test_2_any_other_is_left_alone(equation: str, shapes: tuple[tuple[int, ...], ...]) -> None:
    assert [node.op_type for node in transpose_einsums(einsum(equation, *shapes)).graph] == ["Einsum"]
