"""Products in int8 as ONNX Runtime's kernels want them: uint8 by int8 into float, and convolutions as such products.

1. Rounded activations become uint8 with a zero point of 128, which are the same numbers: kernels of x86 multiply uint8
   with int8 and are slower where both have a sign.
2. A 2-D convolution of one group becomes a MatMul over patches, whose weight is stored as [kw, kh, in, out]. ONNX
   Runtime's own QLinearConv would have to round its result to eight bits as well.
3. A Gemm becomes a MatMul, its weight stored as [in, out], and an Add.
4. Other types than float32, other convolutions and scaled Gemms stay: they compute in floats what was rounded.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from toolchain.graph.insert import Inserter, replace_value, shape_of, shared_constant
from toolchain.graph.placeholder import placeholder
from toolchain.graph.transpose import SUFFIX
from toolchain.precision.activations import quantized_products
from toolchain.precision.stored import SCALES, VALUES

OFFSET = 128


def as_products(model: ir.Model) -> ir.Model:
    """A copy of a graph whose weights and activations were quantised, with all that decides the weight file."""
    if not any(node.op_type == "DequantizeLinear" for node in model.graph):
        return model
    model = model.clone()
    for node in list(model.graph):
        if node.op_type in ("QuantizeLinear", "DequantizeLinear") and _zero(node) == ir.DataType.INT8:
            _shift(model.graph, node)
    for _, node in list(quantized_products(model, "int8")):
        value = node.inputs[0]
        if value is not None and value.dtype == ir.DataType.FLOAT and _rounded(value) is not None:
            if node.op_type == "Conv":
                _convolution(model.graph, node)
            elif node.op_type == "Gemm":
                _gemm(model.graph, node)
    common.RemoveUnusedNodesPass()(model)
    return model


def _zero(node: ir.Node) -> ir.DataType | None:
    """The type of the zero point, which only activations have."""
    zero = node.inputs[2] if len(node.inputs) == 3 else None
    return None if zero is None else zero.dtype


def _shift(graph: ir.Graph, node: ir.Node) -> None:
    """1"""
    if node.op_type == "QuantizeLinear":
        node.outputs[0].type = ir.TensorType(ir.DataType.UINT8)
    node.replace_input_with(2, shared_constant(graph, "zero.uint8", np.array(OFFSET, np.uint8)))


def _rounded(value: ir.Value) -> ir.Node | None:
    """The DequantizeLinear of an activation's pair."""
    node = value.producer()
    return node if node is not None and node.op_type == "DequantizeLinear" and len(node.inputs) == 3 else None


def _gemm(graph: ir.Graph, node: ir.Node) -> None:
    """3"""
    scaled = any(node.attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta"))
    turned = node.attributes.get_int("transA", 0) != 0
    if scaled or turned:
        return
    rows, weight, *bias = node.inputs
    assert rows is not None
    assert weight is not None
    if node.attributes.get_int("transB", 0) != 0:
        weight = _turned(graph, weight)
    before, shape = Inserter(node), shape_of(node.outputs[0])
    made = before.add("MatMul", [rows, weight], shape, {})
    if bias and bias[0] is not None:
        made = before.add("Add", [made, bias[0]], shape, {})
    replace_value(node.outputs[0], made)


def _convolution(graph: ir.Graph, node: ir.Node) -> None:
    """2"""
    value, weight, *bias = node.inputs
    assert value is not None
    assert weight is not None
    plain = node.attributes.get_int("group", 1) == 1 and node.attributes.get_string("auto_pad", "NOTSET") == "NOTSET"
    if not plain or len(shape_of(value)) != 4:
        return
    batch, out, *sides = shape_of(node.outputs[0])
    before = Inserter(node)
    rows = _rows(before, node)
    columns = before.reshape(_turned(graph, weight), (shape_of(rows)[-1], out))
    shape = (batch, sides[0] * sides[1], out)
    made = before.add("MatMul", [rows, columns], shape, {})
    if bias and bias[0] is not None:
        made = before.add("Add", [made, bias[0]], shape, {})
    turned = before.add("Transpose", [made], (batch, out, sides[0] * sides[1]), {"perm": (0, 2, 1)})
    result = before.reshape(turned, (batch, out, *sides))
    replace_value(node.outputs[0], result)


def _rows(before: Inserter, convolution: ir.Node) -> ir.Value:
    """The patches of a convolution's input, [B, outputs, kw * kh * C], gathered while they are in eight bits."""
    value, weight = convolution.inputs[:2]
    assert value is not None
    assert weight is not None
    pair = _rounded(value)
    assert pair is not None
    integers, scale, zero = pair.inputs
    assert integers is not None
    batch, channels, height, width = shape_of(value)
    pixels = before.reshape(integers, (batch, channels, height * width))
    perm = {"perm": (0, 2, 1)}
    rows = before.add("Transpose", [pixels], (batch, height * width, channels), perm, dtype=pixels.dtype)
    index = _patches(convolution, (height, width), shape_of(weight)[2:], shape_of(convolution.outputs[0])[2:])
    if index.shape[1] > 1 or not np.array_equal(index[:, 0], np.arange(height * width)):
        rows = _gather(before, rows, index)
    return before.add("DequantizeLinear", [rows, scale, zero], shape_of(rows), {})


def _gather(before: Inserter, rows: ir.Value, index: NDArray[np.int32]) -> ir.Value:
    """Pixels [B, H * W, C] uint8 -> patches [B, outputs, kw * kh * C]; zeros around the picture."""
    batch, pixels, channels = shape_of(rows)
    if index.max() == pixels:
        zeros = before.constant(np.full((batch, 1, channels), OFFSET, np.uint8))
        rows = before.add("Concat", [rows, zeros], (batch, pixels + 1, channels), {"axis": 1}, dtype=rows.dtype)
    wanted = before.constant(index.reshape(-1))
    found = before.add("Gather", [rows, wanted], (batch, index.size, channels), {"axis": 1}, dtype=rows.dtype)
    return before.reshape(found, (batch, len(index), index.shape[1] * channels))


def _patches(node: ir.Node, size: tuple[int, int], kernel: tuple[int, ...], out: tuple[int, ...]) -> NDArray[np.int32]:
    """[outputs, kw * kh]: the pixel that each weight meets, of `size` counted row by row; one more for the padding."""
    strides = list(node.attributes.get_ints("strides", [1, 1]))
    dilations = list(node.attributes.get_ints("dilations", [1, 1]))
    pads = list(node.attributes.get_ints("pads", [0, 0, 0, 0]))
    y, x = (
        np.arange(out[i])[:, None] * strides[i] + np.arange(kernel[i]) * dilations[i] - pads[i] for i in (0, 1)
    )  # [outputs, weights] along each side
    y, x = y[:, None, None, :], x[None, :, :, None]
    inside = (y >= 0) & (y < size[0]) & (x >= 0) & (x < size[1])
    index = np.where(inside, y * size[1] + x, size[0] * size[1])
    return index.reshape(out[0] * out[1], -1).astype(np.int32)


def _turned(graph: ir.Graph, widened: ir.Value) -> ir.Value:
    """A widened weight whose axes are stored the other way round; the convention of `transpose_weights`."""
    node = widened.producer()
    assert node is not None
    values, scales = node.inputs
    assert values is not None
    assert scales is not None
    name, shape = str(values.name).removesuffix(VALUES) + SUFFIX, shape_of(values)[::-1]
    inputs = [_weight(graph, values, name + VALUES, shape), _weight(graph, scales, name + SCALES, shape[-1:])]
    return Inserter(node).add("DequantizeLinear", inputs, shape, {"axis": len(shape) - 1})


def _weight(graph: ir.Graph, like: ir.Value, name: str, shape: tuple[int, ...]) -> ir.Value:
    assert like.dtype is not None
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(like.dtype))
    value.const_value = placeholder(name, like.dtype, shape)
    graph.register_initializer(value)
    return value
