"""What TensorRT's inspector tells, in both of its layouts, against what a graph asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from tests.build_graph import write_network
from toolchain.engines.layers import Layer, asked_dtypes, compare_precision, require_precision
from toolchain.engines.tensorrt.inspector import read_layers
from toolchain.errors import EngineError

ASKED = dict.fromkeys(["first", "second", "third", "fourth"], "float16")


def layer(name: str, *kinds: str, nodes: tuple[str, ...] = (), ten: bool = False, **more: Any) -> dict[str, Any]:
    """A layer as the inspector of TensorRT 10 or 11 writes it, its tensors of the given kinds."""
    key = "Format/Datatype" if ten else "Datatype"
    tensors = [{"Name": "t", "Dimensions": [2, 4], key: kind} for kind in kinds]
    metadata = "\x1f".join(f"[ONNX Layer: {node}]" for node in nodes)
    return {"Name": name, "Inputs": tensors[:1], "Outputs": tensors[1:], "Metadata": metadata, **more}


def judged(asked: dict[str, str], *layers: dict[str, Any] | str) -> dict[str, Any]:
    precision = compare_precision(asked, read_layers({"Layers": list(layers)}))
    require_precision(precision, "here", "TensorRT")
    return precision.to_json()


SPELLED = [
    ("Half", "float16"),
    ("FP16", "float16"),
    ("Row major linear FP16 format", "float16"),
    ("Channel major FP16 format where channel % 8 == 0", "float16"),
    ("Float", "float32"),
    ("Row major linear FP32", "float32"),
    ("BFloat16", "bfloat16"),
    ("Channel major BFloat16 format where channel % 8 == 0", "bfloat16"),
    ("BF16", "bfloat16"),
    ("Int8", "int8"),
    ("FP8", "float8"),
]


@pytest.mark.parametrize("ten", [True, False])
@pytest.mark.parametrize(("text", "dtype"), SPELLED)
def test_spellings_of_types(text: str, dtype: str, ten: bool) -> None:
    assert read_layers({"Layers": [layer("l", text, ten=ten)]})[0].dtypes == {dtype}


@pytest.mark.parametrize("text", ["Int32", "Int64", "UInt8", "Bool", ""])
def test_other_types_say_nothing(text: str) -> None:
    assert read_layers({"Layers": [layer("l", text)]})[0].dtypes == frozenset()


def test_nodes_come_from_the_metadata_or_else_the_name() -> None:
    fused = layer("__myl_fc_0", "Half", nodes=("first", "second"))
    found = read_layers({"Layers": [fused, layer("third + fourth", "Half"), "bare"], "Bindings": ["x"]})
    assert [f.nodes for f in found] == [("first", "second"), ("third", "fourth"), ()]
    assert found[2] == Layer("bare", "", frozenset(), ())


def test_the_type_of_a_layers_weights_counts() -> None:
    conv = layer("first", "Float", "Float", Weights={"Type": "Half", "Count": 9})
    assert judged({"first": "float16"}, conv)["wide"] == {}


def test_a_graph_says_what_its_weights_are(tmp_path: Path) -> None:
    write_network(tmp_path, "bfloat16")
    assert asked_dtypes(ir.load(tmp_path / "graph.onnx")) == dict.fromkeys(["first", "second", "third"], "bfloat16")


def test_an_engine_of_the_right_precision() -> None:
    layers = [layer(name, "Half", "Half", nodes=(name,)) for name in ASKED]
    assert judged(ASKED, *layers) == {"asked": {"float16": 4}, "layers": {"float16": 4}, "wide": {}}


def test_a_fused_layer_at_the_border_is_told_and_forgiven() -> None:
    inner = layer("inner", "Half", nodes=("first", "second", "third"))
    border = layer("border", "Float", "Float", nodes=("fourth",))
    assert judged(ASKED, inner, border)["wide"] == {"float16": ["fourth"]}


def test_half_of_the_nodes_are_forgiven_and_one_more_is_not() -> None:
    wide = [layer(name, "Float", "Float", nodes=(name,)) for name in ASKED]
    right = [layer(name, "Half", nodes=(name,)) for name in ASKED]
    judged(ASKED, *wide[:2], *right[2:])
    with pytest.raises(EngineError) as error:
        judged(ASKED, *wide[:3], *right[3:])
    assert "another precision than the graph's float16" in str(error.value)
    assert "4 convolutions and products in float16" in str(error.value)
    assert "1 in float16, 3 in float32; in float32 alone: first, second, third" in str(error.value)


def test_an_engine_in_float32_whose_layers_name_no_nodes() -> None:
    with pytest.raises(EngineError, match="layers: 2 in float32"):
        judged(ASKED, layer("myelin0", "Float"), layer("myelin1", "Float"))


def test_an_opaque_layer_for_a_whole_graph_is_not_judged() -> None:
    whole = layer("{ForeignNode[first...last]}", "Float", "Float")
    assert judged({str(i): "float16" for i in range(10)}, whole)["layers"] == {"float32": 1}
    with pytest.raises(EngineError, match="layers: 1 in float32"):
        judged({str(i): "float16" for i in range(9)}, whole)


def test_an_opaque_layer_that_names_its_nodes_is_not_judged() -> None:
    """Between the ends of a graph in float32 it may compute in anything."""
    asked = {str(i): "float16" for i in range(20)}
    whole = layer("{ForeignNode[0...19]}", "Float", "Float", nodes=tuple(asked))
    found = compare_precision(asked, read_layers({"Layers": [whole]}))
    require_precision(found, "graph.onnx", "TensorRT")
    assert found.opaque
    assert found.named == 20


def test_bfloat16_in_float16_is_not_bfloat16() -> None:
    with pytest.raises(EngineError, match="the graph's bfloat16"):
        judged({"first": "bfloat16"}, layer("first", "Half", "Half"))


def test_modules_kept_in_float32_are_no_fault() -> None:
    asked = {**ASKED, "norm": "float32"}
    layers = [layer(name, "Half", nodes=(name,)) for name in ASKED]
    assert judged(asked, *layers, layer("norm", "Float"))["asked"] == {"float16": 4, "float32": 1}


def test_an_engine_without_detail_is_not_judged() -> None:
    assert judged(ASKED, "first", "second")["layers"] == {}
