"""The opset of bfloat16 graphs: the numbered cases of the pass."""

from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from toolchain.errors import ExportError
from toolchain.graph.opset import allow_bfloat16, raise_opset

REST = {"Conv": "w", "ConvTranspose": "w", "InstanceNormalization": "bb", "GroupNormalization": "bb", "Relu": ""}


def graph(kind: int, op: str = "Conv", opset: int = 20) -> ir.Model:
    x = helper.make_tensor_value_info("x", kind, [1, 4, 8, 8])
    y = helper.make_tensor_value_info("y", kind, [1, 4, 8, 8])
    w = helper.make_tensor("w", kind, [4, 4, 1, 1], [0.0] * 16)
    b = helper.make_tensor("b", kind, [4], [0.0] * 4)
    more = {"num_groups": 2} if op == "GroupNormalization" else {}
    nodes = [helper.make_node("Relu", ["x"], ["c"], name="c"), helper.make_node(op, ["c", *REST[op]], ["y"], **more)]
    made = helper.make_graph(nodes, "g", [x], [y], [w, b])
    return ir.from_proto(helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)], ir_version=10))


def check(model: ir.Model) -> None:
    onnx.checker.check_model(ir.to_proto(model), full_check=True)


@pytest.mark.parametrize("op", ["Conv", "ConvTranspose", "InstanceNormalization"])
def test_case_1_bfloat16_becomes_legal(op: str) -> None:
    model = graph(TensorProto.BFLOAT16, op)
    with pytest.raises(onnx.shape_inference.InferenceError, match="bfloat16"):
        check(model)
    done = allow_bfloat16(model)
    assert done.opset_imports[""] == 22
    check(done)
    assert model.opset_imports[""] == 20  # the given model stays as it was


def test_case_2_group_normalization() -> None:
    model = graph(TensorProto.BFLOAT16, "GroupNormalization")
    assert allow_bfloat16(model) is model


def test_case_3_other_operators() -> None:
    model = graph(TensorProto.BFLOAT16, "Relu")
    assert allow_bfloat16(model) is model


@pytest.mark.parametrize("kind", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_case_3_other_types(kind: int) -> None:
    model = graph(kind)
    assert allow_bfloat16(model) is model


def test_a_newer_opset_stays() -> None:
    model = graph(TensorProto.BFLOAT16, "Relu", 23)
    assert allow_bfloat16(model).opset_imports[""] == 23


@pytest.mark.parametrize(("before", "after"), [(20, 21), (21, 21), (23, 23)])
def test_case_4_a_newer_opset_where_it_is_needed(before: int, after: int) -> None:
    model = graph(TensorProto.FLOAT, "Conv", before)
    done = raise_opset(model, 21)
    assert done.opset_imports[""] == after
    check(done)
    assert model.opset_imports[""] == before


def test_case_4_group_normalization_is_refused() -> None:
    with pytest.raises(ExportError, match="GroupNormalization means something else from opset 21 on"):
        raise_opset(graph(TensorProto.FLOAT, "GroupNormalization"), 21)
    assert raise_opset(graph(TensorProto.FLOAT, "GroupNormalization", 21), 21).opset_imports[""] == 21
