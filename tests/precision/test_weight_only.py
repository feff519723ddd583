"""The numbered cases of `quantize_weights`."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import pytest

from tests.graph.test_simplify import F32, model, ops, value, weight
from toolchain.errors import ExportError
from toolchain.graph.parser_rules import refusals
from toolchain.graph.transpose import transpose_weights
from toolchain.graph.typed import check_types
from toolchain.precision.stored import SCALES, Form, Stored
from toolchain.precision.weight_only import dequantized_weights, quantize_weights, survey


def conv(name: str, x: ir.Value, w: ir.Value, op: str = "Conv") -> ir.Node:
    return ir.node(op, [x, w], {"pads": [1, 1, 1, 1]}, outputs=[value(f"{name}.y", (1, 32, 8, 8))], name=name)


def three_convolutions() -> ir.Model:
    """Of which the one in the middle is neither first nor last."""
    x = value("x", (1, 32, 8, 8))
    weights = [weight(f"{name}.weight", (32, 32, 3, 3)) for name in ("first", "body.middle", "last")]
    nodes: list[ir.Node] = []
    for w in weights:
        nodes.append(conv(str(w.name).removesuffix(".weight"), nodes[-1].outputs[0] if nodes else x, w))
    return model(nodes, [x], [nodes[-1].outputs[0]], weights)


def product(op: str, shape: tuple[int, int], *, flipped: bool = False, dtype: ir.DataType = F32, **attributes: Any):  # type: ignore[no-untyped-def]
    x, w = value("x", (4, 64), dtype), weight("linear.weight", shape)
    if dtype != F32:
        from toolchain.graph.placeholder import placeholder

        w = value("linear.weight", shape, dtype)
        w.const_value = placeholder("linear.weight", dtype, shape)
    nodes, second = [], w
    if flipped:
        nodes.append(ir.node("Transpose", [w], {"perm": [1, 0]}, outputs=[value("t", shape[::-1], dtype)]))
        second = nodes[0].outputs[0]
    nodes.append(ir.node(op, [x, second], attributes, outputs=[value("y", (4, 128), dtype)]))
    return model(nodes, [x], [nodes[-1].outputs[0]], [w])


def initializers(found: ir.Model) -> dict[str, tuple[str, list[Any]]]:
    tensors = ((name, v.const_value) for name, v in found.graph.initializers.items())
    return {str(name): (t.dtype.name, list(t.shape)) for name, t in tensors if t is not None}


def test_1_a_convolution_reads_its_weight_through_a_dequantize_linear() -> None:
    found = quantize_weights(three_convolutions(), ())
    assert ops(found) == ["Conv", "DequantizeLinear", "Conv", "Conv"]
    assert initializers(found) == {
        "first.weight": ("FLOAT", [32, 32, 3, 3]),
        "last.weight": ("FLOAT", [32, 32, 3, 3]),
        "body.middle.weight.int8": ("INT8", [32, 32, 3, 3]),
        "body.middle.weight.scales": ("FLOAT", [32]),
    }
    assert dequantized_weights(found) == {"body.middle.weight": Stored("int8", (32, 32, 3, 3), 0)}
    check_types(found)
    assert refusals(found) == []


@pytest.mark.parametrize("dtype", [F32, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize(
    ("op", "shape", "attributes", "channels"),
    [
        ("MatMul", (64, 128), {}, 1),
        ("MatMul", (128, 64), {"flipped": True}, 0),
        ("Gemm", (64, 128), {}, 1),
        ("Gemm", (128, 64), {"transB": 1}, 0),
    ],
)
def test_1_a_product(
    op: str, shape: tuple[int, int], attributes: dict[str, Any], channels: int, dtype: ir.DataType
) -> None:
    found = quantize_weights(product(op, shape, dtype=dtype, **attributes), ())
    assert ops(found) == ["DequantizeLinear", *(["Transpose"] if "flipped" in attributes else []), op]
    assert dequantized_weights(found) == {"linear.weight": Stored("int8", shape, channels)}
    assert initializers(found)["linear.weight.scales"] == (dtype.name, [128])
    assert found.graph[0].outputs[0].dtype == dtype
    check_types(found)
    assert refusals(found) == []


def test_1_a_weight_that_a_backend_transposed_keeps_its_name() -> None:
    found = quantize_weights(transpose_weights(product("MatMul", (128, 64), flipped=True)), ())
    assert ops(found) == ["DequantizeLinear", "MatMul"]
    assert dequantized_weights(found) == {"linear.weight.transposed": Stored("int8", (64, 128), 1)}


def test_1_a_transposed_convolution_has_its_channels_second() -> None:
    made = three_convolutions()
    middle = list(made.graph)[1]
    middle.op_type = "ConvTranspose"
    assert dequantized_weights(quantize_weights(made, ())) == {"body.middle.weight": Stored("int8", (32, 32, 3, 3), 1)}


def test_1_what_is_no_weight_of_a_product_is_left_alone() -> None:
    x, w, batch = value("x", (64, 64)), weight("a.weight", (64, 64)), weight("b.weight", (4, 64, 64))
    nodes = [
        ir.node("MatMul", [w, x], outputs=[value("left", (64, 64))]),
        ir.node("MatMul", [x, batch], outputs=[value("several", (4, 64, 64))]),
        ir.node("Add", [x, weight("c.weight", (64, 64))], outputs=[value("sum", (64, 64))]),
    ]
    made = model(nodes, [x], [node.outputs[0] for node in nodes], [w, batch, nodes[2].inputs[1]])  # type: ignore[list-item]
    assert ops(quantize_weights(made, ())) == ["MatMul", "MatMul", "Add"]
    assert survey(made, ()).quantized == ()
    assert survey(made, ()).left == {}


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("conv_in", "first or last convolution"),
        ("time_embedding.linear_1", "embedding"),
        ("down_blocks.0.resnets.0.time_emb_proj", "embedding"),
        ("time_text_embed.timestep_embedder.linear_1", "embedding"),
        ("down_blocks.0.resnets.0.conv_shortcut", "shortcut"),
        ("norm_out.linear", "final projection"),
        ("proj_out", "final projection"),
        ("single_transformer_blocks.0.proj_out", None),
        ("single_transformer_blocks.0.norm.linear", None),
        ("body.0.ff", "excluded"),
        ("body.0.ff.net.2", "excluded"),
        ("body.1.attn", "excluded"),
        ("body.1.attention", None),
    ],
)
def test_2_3_by_name(name: str, reason: str | None) -> None:
    made = product("MatMul", (64, 128))
    made.graph.initializers["linear.weight"].name = f"{name}.weight"
    found = survey(made, ("*.ff", "body.*.attn"))
    assert found.left == ({} if reason is None else {f"{name}.weight": reason})
    assert ops(quantize_weights(made, ("*.ff", "body.*.attn"))) == [
        *(["DequantizeLinear"] if not reason else []),
        "MatMul",
    ]
    count = 0 if reason else 1
    left = {reason: [f"{name}.weight"]} if reason else {}
    assert found.to_json() == {"type": "int8", "weights": count, "of": 1, "left": left}


def test_2_the_first_and_the_last_convolution_whatever_their_names() -> None:
    left = survey(three_convolutions(), ()).left
    assert left == dict.fromkeys(["first.weight", "last.weight"], "first or last convolution")


def test_3_a_small_weight_and_one_that_is_read_twice() -> None:
    assert survey(product("MatMul", (64, 63)), ()).left == {"linear.weight": "small"}
    assert survey(product("MatMul", (64, 64)), ()).left == {}
    made = product("MatMul", (64, 64))
    made.graph.append(ir.node("Neg", [made.graph.initializers["linear.weight"]]))
    assert survey(made, ()).left == {"linear.weight": "read twice"}
    assert ops(quantize_weights(made, ())) == ["MatMul", "Neg"]


def test_3_a_transposed_weight_that_two_products_read() -> None:
    made = product("MatMul", (128, 64), flipped=True)
    x, turned = made.graph.inputs[0], made.graph[0].outputs[0]
    made.graph.append(ir.node("MatMul", [x, turned], outputs=[value("z", (4, 128))]))
    for graph in (made, transpose_weights(made)):
        assert survey(graph, ()).left == {"linear.weight": "read twice"}
        assert "DequantizeLinear" not in ops(quantize_weights(graph, ()))


def test_4_twice_is_once_and_the_given_graph_stays() -> None:
    made = three_convolutions()
    before = ir.to_proto(made).SerializeToString()
    once = quantize_weights(made, ())
    assert ir.to_proto(made).SerializeToString() == before
    assert ir.to_proto(quantize_weights(once, ())).SerializeToString() == ir.to_proto(once).SerializeToString()


BLOCKS = Form("int4", 32)


@pytest.mark.parametrize("dtype", [F32, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
@pytest.mark.parametrize(
    ("op", "shape", "attributes", "inputs"),
    [
        ("MatMul", (64, 128), {}, 0),
        ("MatMul", (128, 64), {"flipped": True}, 1),
        ("Gemm", (64, 128), {}, 0),
        ("Gemm", (128, 64), {"transB": 1}, 1),
    ],
)
def test_5_blocks_lie_along_the_inputs(
    op: str, shape: tuple[int, int], attributes: dict[str, Any], inputs: int, dtype: ir.DataType
) -> None:
    made = product(op, shape, dtype=dtype, **attributes)
    made.opset_imports[""] = 20
    found = quantize_weights(made, (), BLOCKS)
    assert ops(found) == ["DequantizeLinear", *(["Transpose"] if "flipped" in attributes else []), op]
    assert dequantized_weights(found) == {"linear.weight": Stored("int4", shape, inputs, 32)}
    assert initializers(found) == {
        "linear.weight.int4": ("INT4", list(shape)),
        "linear.weight.scales": (dtype.name, [2, 128] if inputs == 0 else [128, 2]),
    }
    assert found.opset_imports[""] == 21
    assert made.opset_imports[""] == 20
    check_types(found)
    assert refusals(found) == []


def test_5_convolutions_and_what_has_no_whole_blocks_are_left_alone() -> None:
    assert survey(three_convolutions(), (), BLOCKS).left["body.middle.weight"] == "convolution"
    assert "DequantizeLinear" not in ops(quantize_weights(three_convolutions(), (), BLOCKS))
    made = product("MatMul", (64, 128))
    facts = survey(made, (), Form("int4", 128)).to_json()
    assert facts == {"type": "int4", "weights": 0, "of": 1, "left": {"no whole blocks of 128": ["linear.weight"]}}
    assert ops(quantize_weights(made, (), Form("int4", 128))) == ["MatMul"]
    assert survey(made, (), Form("int4", 64)).quantized == ("linear.weight",)


def test_5_an_old_graph_with_a_group_normalization_is_refused() -> None:
    """Of opset 21, which blocks need, it means something else."""
    made = product("MatMul", (64, 128))
    made.opset_imports[""] = 20
    made.graph.append(ir.node("GroupNormalization", [made.graph.outputs[0]] * 3, {"num_groups": 2}))
    with pytest.raises(ExportError, match="GroupNormalization"):
        quantize_weights(made, (), BLOCKS)


def test_5_blocks_twice_is_once_and_the_given_graph_stays() -> None:
    made = product("MatMul", (128, 64), flipped=True)
    before = ir.to_proto(made).SerializeToString()
    once = quantize_weights(made, (), BLOCKS)
    assert ir.to_proto(made).SerializeToString() == before
    assert ir.to_proto(quantize_weights(once, (), BLOCKS)).SerializeToString() == ir.to_proto(once).SerializeToString()


def test_1_float8_has_a_scale_for_each_output_channel() -> None:
    found = quantize_weights(three_convolutions(), (), Form("float8"))
    assert dequantized_weights(found) == {"body.middle.weight": Stored("float8", (32, 32, 3, 3), 0)}
    assert initializers(found)["body.middle.weight.float8"] == ("FLOAT8E4M3FN", [32, 32, 3, 3])
    assert initializers(found)["body.middle.weight" + SCALES] == ("FLOAT", [32])
    assert survey(three_convolutions(), (), Form("float8")).to_json()["type"] == "float8"
    check_types(found)
    assert refusals(found) == []
