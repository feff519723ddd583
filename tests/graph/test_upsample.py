"""The numbered cases of `fold_upsampling`, and its numbers against ONNX's own reference."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from tests.graph.test_simplify import constant, model, ops, value, weight
from toolchain.graph.placeholder import is_weight
from toolchain.graph.typed import check_types
from toolchain.graph.upsample import fold_upsampling, folded

NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
PADDED = {"pads": [1, 1, 1, 1]}


def upsampled(
    *, bias: bool = True, resize: Any = NEAREST, conv: Any = PADDED, kernel: int = 3, read_twice: bool = False
) -> ir.Model:
    """Conv(Resize(x)) of 2 x 3 x 4 x 5 pixels into six channels."""
    x, scales = value("x", (2, 3, 4, 5)), constant("scales", np.array([1, 1, 2, 2], np.float32))
    large, y = value("large", (2, 3, 8, 10)), value("y", (2, 6, 8, 10))
    weights = [weight("up.weight", (6, 3, kernel, kernel)), *([weight("up.bias", (6,))] if bias else [])]
    nodes = [
        ir.node("Resize", [x, None, scales], resize, outputs=[large]),
        ir.node("Conv", [large, *weights], conv, outputs=[y], name="up"),
    ]
    return model(nodes, [x], [y, *([large] if read_twice else [])], [*weights, scales])


def run(graph: ir.Model, arrays: dict[str, np.ndarray], x: np.ndarray) -> np.ndarray:
    graph = graph.clone()
    for name, initializer in graph.graph.initializers.items():
        if is_weight(initializer):
            initializer.const_value = ir.tensor(arrays[str(name)], name=name)
    outputs: list[Any] = ReferenceEvaluator(ir.to_proto(graph)).run(None, {"x": x})
    return np.asarray(outputs[0])


@pytest.mark.parametrize("bias", [True, False])
def test_1_the_numbers_are_the_same(bias: bool) -> None:
    random = np.random.default_rng(0)
    made = upsampled(bias=bias)
    before = ops(made)
    found = fold_upsampling(made)
    assert "Resize" not in ops(found)
    assert ops(found)[-1] == "DepthToSpace"
    check_types(found)
    kernel = random.standard_normal((6, 3, 3, 3)).astype(np.float32)
    shift = random.standard_normal(6).astype(np.float32)
    x = random.standard_normal((2, 3, 4, 5)).astype(np.float32)
    expected = run(made, {"up.weight": kernel, "up.bias": shift}, x)
    got = run(found, {"up.weight.upsampled": folded(kernel), "up.bias": shift}, x)
    assert np.abs(got - expected).max() <= 1e-5
    assert sorted(n for n, v in found.graph.initializers.items() if is_weight(v))[-1] == "up.weight.upsampled"
    assert "up.weight" not in found.graph.initializers
    assert [node.name for node in found.graph if node.op_type == "Conv"] == ["up"]
    assert ops(made) == before  # the given graph is not changed
    assert ops(fold_upsampling(found)) == ops(found)


@pytest.mark.parametrize(
    "different",
    [
        {"resize": NEAREST | {"mode": "linear"}},
        {"resize": NEAREST | {"nearest_mode": "ceil"}},
        {"resize": NEAREST | {"coordinate_transformation_mode": "half_pixel"}},
        {"conv": {"pads": [1, 1, 1, 1], "strides": [1, 2]}},
        {"conv": {"pads": [2, 2, 2, 2], "dilations": [2, 2]}},
        {"conv": {"pads": [0, 1, 2, 1]}},
        {"conv": {}},
        {"conv": {}, "kernel": 1},
        {"read_twice": True},
    ],
)
def test_2_others_are_left_alone(different: Any) -> None:
    made = upsampled(**different)
    assert ops(fold_upsampling(made)) == ops(made)


def test_2_a_weight_that_is_computed_is_left_alone() -> None:
    made = upsampled()
    conv = made.graph[-1]
    two = constant("two", np.array(2, np.float32))
    made.graph.register_initializer(two)
    twice = ir.node("Mul", [conv.inputs[1], two], outputs=[value("w", (6, 3, 3, 3))])
    made.graph.insert_before(conv, twice)
    conv.replace_input_with(1, twice.outputs[0])
    assert "Resize" in ops(fold_upsampling(made))
