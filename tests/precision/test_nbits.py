"""The numbered cases of `use_matmul_nbits`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from tests.graph.test_simplify import F32, ops, value
from tests.precision.test_weight_only import BLOCKS, initializers, product, three_convolutions
from toolchain.engines.onnxruntime.prepare import prepare
from toolchain.graph.typed import check_types
from toolchain.precision.nbits import nbits_weights, use_matmul_nbits
from toolchain.precision.stored import Form, Stored
from toolchain.precision.weight_only import quantize_weights

STORED = Stored("uint4", (128, 64), 1, 32)


@pytest.mark.parametrize("dtype", [F32, ir.DataType.FLOAT16])
@pytest.mark.parametrize(
    ("op", "shape", "attributes", "name"),
    [
        ("MatMul", (128, 64), {"flipped": True}, "linear.weight"),
        ("MatMul", (64, 128), {}, "linear.weight.transposed"),
        ("Gemm", (128, 64), {"transB": 1}, "linear.weight"),
        ("Gemm", (64, 128), {}, "linear.weight.transposed"),
    ],
)
def test_1_a_product(
    op: str, shape: tuple[int, int], attributes: dict[str, Any], name: str, dtype: ir.DataType
) -> None:
    """As the backend prepares it: whichever way the weight lies in the checkpoint, rows of inputs are read."""
    made = quantize_weights(prepare(product(op, shape, dtype=dtype, **attributes)), (), BLOCKS)
    found = use_matmul_nbits(made)
    assert ops(found) == ["MatMulNBits"]
    assert nbits_weights(found) == {name: STORED}
    assert initializers(found) == {
        f"{name}.uint4": ("UINT8", [128, 2, 16]),
        f"{name}.scales": (dtype.name, [128, 2]),
    }
    node = found.graph[0]
    assert {key: attribute.as_int() for key, attribute in node.attributes.items()} == {
        "N": 128,
        "K": 64,
        "bits": 4,
        "block_size": 32,
        "accuracy_level": 1,
    }
    assert [(v.name, v.dtype) for v in found.graph.outputs] == [("y", dtype)]
    assert found.opset_imports["com.microsoft"] == 1
    check_types(found)


def test_2_a_gemm_with_a_bias() -> None:
    made = product("Gemm", (128, 64), transB=1)
    bias = value("bias", (128,))
    made.graph.inputs.append(bias)
    made.graph[0].resize_inputs(3)
    made.graph[0].replace_input_with(2, bias)
    found = use_matmul_nbits(quantize_weights(made, (), BLOCKS))
    assert ops(found) == ["MatMulNBits", "Add"]
    assert found.graph[1].inputs[1] is found.graph.inputs[1]
    assert [v.name for v in found.graph.outputs] == ["y"]
    check_types(found)


@pytest.mark.parametrize("form", [Form("int8"), Form("float8")])
def test_3_what_has_no_blocks(form: Form) -> None:
    for made in (product("MatMul", (64, 128)), three_convolutions()):
        quantized = quantize_weights(made, (), form)
        assert ops(use_matmul_nbits(quantized)) == ops(quantized)
        assert ops(use_matmul_nbits(made)) == ops(made)
        assert nbits_weights(quantized) == {}


def test_twice_is_once_and_the_given_graph_stays() -> None:
    made = quantize_weights(prepare(product("MatMul", (128, 64), flipped=True)), (), BLOCKS)
    before = ir.to_proto(made).SerializeToString()
    once = use_matmul_nbits(made)
    assert ir.to_proto(made).SerializeToString() == before
    assert ir.to_proto(use_matmul_nbits(once)).SerializeToString() == ir.to_proto(once).SerializeToString()
