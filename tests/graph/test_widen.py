"""The numbered cases of `widen_operators`, and what NVIDIA's parser says of them."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir
import pytest

from tests.graph.test_parser_rules import asked, one, operands, typed
from tests.graph.test_simplify import ops
from tests.rtx import Parsed, real_trt
from tests.tiny import make_vae, recipe_for
from toolchain.engines.tensorrt.library import numbers
from toolchain.export.capture import capture
from toolchain.graph.opset import allow_bfloat16
from toolchain.graph.parser_rules import refusals
from toolchain.graph.parser_tables import NO_BFLOAT16, OLDEST, TAKES_RTX
from toolchain.graph.typed import check_types
from toolchain.graph.widen import widen_operators
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.recipe import Bucket

BF, HALF, FLOAT = ir.DataType.BFLOAT16, ir.DataType.FLOAT16, ir.DataType.FLOAT
PLAIN = [name for name in sorted(NO_BFLOAT16 & TAKES_RTX.keys()) if operands(name) == 1]


@pytest.mark.parametrize("op_type", PLAIN)
def test_1_it_is_computed_in_float32(op_type: str) -> None:
    """The oldest opset that has the operator is enough: ONNX's Mish has bfloat16 since opset 22."""
    given = one(op_type, typed("x", BF), opset=20, dtype=BF)
    found = widen_operators(given)
    assert ops(found) == ["Cast", op_type, "Cast"]
    assert [(v.name, v.dtype) for v in (*found.graph.inputs, *found.graph.outputs)] == [("x", BF), ("y0", BF)]
    assert refusals(found, OLDEST) == []
    if op_type in ("Mish", "Celu", "HardSwish", "Shrink"):  # ONNX cannot infer the others' shapes in float32 either
        check_types(found)


@pytest.mark.parametrize("op_type", PLAIN)
def test_1_the_real_parser_and_builder_take_it(op_type: str) -> None:
    real_trt()
    assert asked(widen_operators(one(op_type, typed("x", BF), opset=20, dtype=BF))) == ""


def test_1_the_real_parser_refuses_mish_without_it() -> None:
    version = numbers(real_trt().__version__)
    given = one("Mish", typed("x", BF), opset=22, dtype=BF)
    assert "Mish" in asked(given)
    assert refusals(given, version) == ["Mish n: bfloat16 is no type that TensorRT's Mish takes"]


def test_1_an_input_of_another_type_stays_as_it_is() -> None:
    given = widen_operators(one("GridSample", typed("x", BF), typed("grid", FLOAT, (1, 8, 8, 2)), dtype=BF))
    assert ops(given) == ["Cast", "GridSample", "Cast"]
    assert given.graph[1].inputs[1] is given.graph.inputs[1]


@pytest.mark.parametrize(("op_type", "dtype"), [("Tanh", BF), ("Mish", HALF), ("Mish", FLOAT)])
def test_2_what_they_take_is_left_alone(op_type: str, dtype: ir.DataType) -> None:
    assert ops(widen_operators(one(op_type, typed("x", dtype), dtype=dtype))) == [op_type]


def test_3_another_domain_is_left_alone() -> None:
    assert ops(widen_operators(one("Mish", typed("x", BF), dtype=BF, domain="com.microsoft"))) == ["Mish"]


def test_a_network_with_mish(tiny_copy: Path) -> None:
    """A VAE of diffusers whose activations are Mish, in bfloat16, through NVIDIA's parser."""
    make_vae(4, act_fn="mish").save_pretrained(tiny_copy / "vae")
    recipe = recipe_for("vae_decoder", dtype="bfloat16")
    source = resolve_model(str(tiny_copy))
    graph = allow_bfloat16(capture(MODELS["sd"].component("vae_decoder"), source, recipe, Bucket(1, 64, 64)))
    found = [node for node in graph.graph if node.op_type == "Mish"]
    assert len(found) > 5
    assert {node.inputs[0].dtype for node in found} == {FLOAT}  # type: ignore[union-attr]
    assert refusals(graph) == []
    real_trt()
    assert Parsed(graph).refused == []
