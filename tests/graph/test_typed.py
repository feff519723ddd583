"""The border after a backend's `prepare`: what breaks ONNX's rules is named by node, operator and types."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx_ir as ir
import pytest

import toolchain.export.capture as capture_module
from tests.graph.test_promote import BOOL, F16, F32, mixed
from tests.graph.test_simplify import model, value, weight
from tests.tiny import recipe_for
from toolchain.builder.stages.graph import GRAPH
from toolchain.builder.stages.weights import prepared
from toolchain.errors import ExportError
from toolchain.graph.typed import check_types
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.recipe import Bucket

BF16 = ir.DataType.BFLOAT16


def fault(found: ir.Model) -> str:
    with pytest.raises(ExportError) as error:
        check_types(found)
    return str(error.value)


def test_a_sound_graph_with_a_weight_without_values() -> None:
    x, w = value("x", (2,)), weight("w", (2,))
    out = ir.node("Mul", [x, w], outputs=[value("y", (2,))])
    check_types(model([out], [x], list(out.outputs), [w]))


@pytest.mark.parametrize("op", ["Concat", "Add", "MatMul", "Where"])
def test_types_that_do_not_agree(op: str) -> None:
    inputs = [value("low", (2,), F16), value("wide", (2,), F32)]
    if op == "Where":
        inputs.insert(0, value("flags", (2,), BOOL))
    text = fault(mixed(op, *inputs, out=F32, **({"axis": 0} if op == "Concat" else {})))
    assert f"{op} mixed" in text
    assert "low float16[2], wide float32[2] -> y float32" in text


def test_a_weight_of_another_type() -> None:
    x, w = value("x", (1, 2, 4, 4), F16), weight("w", (2, 2, 1, 1))
    conv = ir.node("Conv", [x, w], outputs=[value("y", (1, 2, 4, 4), F16)], name="conv")
    text = fault(model([conv], [x], list(conv.outputs), [w]))
    assert "Conv conv" in text
    assert "w float32[2,2,1,1]" in text


def test_a_type_that_the_opset_does_not_allow() -> None:
    x, w = value("x", (1, 2, 4, 4), BF16), value("w", (2, 2, 1, 1), BF16)
    conv = ir.node("Conv", [x, w], outputs=[value("y", (1, 2, 4, 4), BF16)], name="conv")
    made = model([conv], [x, w], list(conv.outputs), [])
    assert "test, opset 20, Conv conv" in fault(made)
    made.opset_imports[""] = 22
    check_types(made)


def test_a_shape_that_does_not_follow() -> None:
    x = value("x", (2, 3))
    turned = ir.node("Transpose", [x], {"perm": [1, 0]}, outputs=[value("y", (2, 3))], name="turn")
    assert "Transpose turn" in fault(model([turned], [x], list(turned.outputs), []))


def test_an_output_of_another_type_than_it_says() -> None:
    x = value("x", (2,), F16)
    out = ir.node("Neg", [x], outputs=[value("y", (2,), F32)], name="neg")
    assert "x float16[2] -> y float32[2]" in fault(model([out], [x], list(out.outputs), []))


class Damaging:
    """A backend that makes an invalid graph of a sound one."""

    def prepare(self, graph: ir.Model) -> ir.Model:
        graph.opset_imports[""] = 12  # whose Neg has no bfloat16
        return graph

    def finish(self, graph: ir.Model) -> ir.Model:
        return graph


def test_what_a_backend_makes_of_a_graph_is_checked(tmp_path: Path) -> None:
    x = value("x", (2,), BF16)
    out = ir.node("Neg", [x], outputs=[value("y", (2,), BF16)], name="neg")
    ir.save(model([out], [x], list(out.outputs), []), tmp_path / GRAPH)
    sound: Any = SimpleNamespace(prepare=lambda graph: graph, finish=lambda graph: graph)
    assert [node.name for node in prepared(sound, tmp_path / GRAPH, None).graph] == ["neg"]
    damaging: Any = Damaging()
    with pytest.raises(ExportError, match="Neg neg"):
        prepared(damaging, tmp_path / GRAPH, None)


def test_an_export_that_mixes_types_is_refused(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As SDXL's was, before the casts that torch means were written."""

    def mixing(model: ir.Model) -> ir.Model:
        node = next(node for node in model.graph if node.op_type == "Concat" and node.name)
        node.inputs[0].dtype = ir.DataType.FLOAT  # type: ignore[union-attr]
        return model

    monkeypatch.setattr(capture_module, "simplify", mixing)
    source, recipe = resolve_model(str(tiny_model)), recipe_for("denoiser", dtype="float16")
    with pytest.raises(ExportError, match="breaks ONNX's rules of types"):
        capture_module.capture(MODELS["sd"].component("denoiser"), source, recipe, Bucket(1, 64, 64))
