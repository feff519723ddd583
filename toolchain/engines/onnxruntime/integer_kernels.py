"""DequantizeLinear(x), DequantizeLinear(W) -> MatMul -> ONNX Runtime's MatMulIntegerToFloat, in one kernel.

ONNX Runtime would fuse them itself, in the pass that also makes MatMulNBits of weights in int8 (`QUANTIZED_FUSIONS`):
here it is done to products whose activations were rounded, and to no others.

1. A MatMul in float32 of uint8 with a matrix in int8, whose scales belong to its columns.
2. An Add of one number per column behind it, such as a bias, goes along.
3. A Reshape between weight and product is moved before the DequantizeLinear, where it is folded.
"""

from __future__ import annotations

import math

import onnx_ir as ir
from onnx_ir.passes import common

from toolchain.graph.attention import DOMAIN
from toolchain.graph.insert import Inserter, replace_value, shape_of
from toolchain.graph.placeholder import is_weight


def fuse_integer_products(model: ir.Model) -> ir.Model:
    """A copy with ONNX Runtime's operator; the weights are shared with the given model."""
    model = model.clone()
    for node in list(model.graph):
        if node.op_type == "MatMul" and node.outputs[0].dtype == ir.DataType.FLOAT:
            _fuse(node)
    if any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports[DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return model


def _fuse(node: ir.Node) -> None:
    rows, weight = _rounded(node.inputs[0]), _weight(node.inputs[1])
    if rows is None or weight is None:
        return
    (integers, scale, zero), (values, scales) = rows.inputs, weight.inputs
    assert integers is not None
    assert values is not None
    output = node.outputs[0]
    before = Inserter(node)
    columns = shape_of(values)[-1]
    matrix = before.reshape(values, (math.prod(shape_of(values)[:-1]), columns))
    inputs = [integers, matrix, scale, scales, zero]
    add = _bias(output, columns)
    if add is not None:
        inputs += [None, next(value for value in add.inputs if value is not output)]
        before, output = Inserter(add), add.outputs[0]
    whole = before.add("MatMulIntegerToFloat", inputs, shape_of(output), {}, domain=DOMAIN)
    replace_value(output, whole)


def _rounded(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of an activation in uint8, with one scale."""
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "DequantizeLinear" or len(node.inputs) != 3:
        return None
    integers, scale = node.inputs[:2]
    fits = integers is not None and integers.dtype == ir.DataType.UINT8 and scale is not None and scale.shape == ()
    return node if fits else None


def _weight(value: ir.Value | None) -> ir.Node | None:
    """The DequantizeLinear of a weight whose last axis is that of the scales."""
    node = value.producer() if value is not None else None
    if node is not None and node.op_type == "Reshape":
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type != "DequantizeLinear" or not is_weight(node.inputs[0]) or len(node.inputs) != 2:
        return None
    values = node.inputs[0]
    assert values is not None
    last = node.attributes.get_int("axis", 1) == len(shape_of(values)) - 1
    return node if values.dtype == ir.DataType.INT8 and last else None


def _bias(product: ir.Value, columns: int) -> ir.Node | None:
    """The Add, alone in reading a product, of one constant for each column."""
    uses = list(product.uses())
    if len(uses) != 1 or product.is_graph_output() or uses[0].node.op_type != "Add":
        return None
    others = [value for value in uses[0].node.inputs if value is not None and value is not product]
    fits = len(others) == 1 and others[0].const_value is not None and shape_of(others[0]) == (columns,)
    return uses[0].node if fits else None
