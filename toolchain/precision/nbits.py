"""Linears in int4 -> MatMulNBits, ONNX Runtime's own operator, which reads the blocks where they lie.

Its weight is [outputs, blocks, block / 2] whatever the product's was, and its values are those of int4 plus 8.

1. MatMul(x, DequantizeLinear(W [inputs, outputs])) becomes MatMulNBits(x, W).
2. Gemm(x, DequantizeLinear(W), bias) becomes MatMulNBits and Add, whichever way W lies.
3. What has no blocks is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from toolchain.graph.placeholder import add_weight, is_weight, static_shape
from toolchain.graph.transpose import SUFFIX
from toolchain.precision.stored import SCALES, Stored

DOMAIN, OPERATOR = "com.microsoft", "MatMulNBits"
INT4, UINT4 = ".int4", ".uint4"
FLOAT_ACTIVATIONS = 1
"""Its accuracy_level that computes in float32; 4 would round activations to int8 (ONNX Runtime 1.32: 120 dB against
44 dB on a linear of 3072 x 12288)."""


def use_matmul_nbits(model: ir.Model) -> ir.Model:
    """A copy in which every product with int4 blocks is a MatMulNBits."""
    model = model.clone()
    for node in list(model.graph):
        dequantize = node.inputs[1].producer() if len(node.inputs) > 1 and node.inputs[1] is not None else None
        values = dequantize.inputs[0] if dequantize is not None and dequantize.op_type == "DequantizeLinear" else None
        if dequantize is not None and values is not None and is_weight(values) and values.dtype is ir.DataType.INT4:
            _replace(model.graph, node, dequantize, values)
    if any(node.op_type == OPERATOR for node in model.graph):
        model.opset_imports[DOMAIN] = 1
    return model


def nbits_weights(model: ir.Model) -> dict[str, Stored]:
    """Every weight of a MatMulNBits, by the name that its initializer would have as [outputs, inputs]."""
    weights = {}
    for node in model.graph:
        value = node.inputs[1] if node.op_type == OPERATOR else None
        if value is not None and is_weight(value):
            rows, columns, block = (node.attributes[name].as_int() for name in ("N", "K", "block_size"))
            weights[str(value.name).removesuffix(UINT4)] = Stored("uint4", (rows, columns), 1, block)
    return weights


def _replace(graph: ir.Graph, node: ir.Node, dequantize: ir.Node, values: ir.Value) -> None:
    """Puts a MatMulNBits, and an Add for a Gemm with a bias, in the place of a product and its DequantizeLinear."""
    scales = dequantize.inputs[1]
    assert values.const_value is not None
    assert scales is not None
    assert scales.dtype is not None
    rows, columns = static_shape(values.const_value)
    axis, block = (dequantize.attributes[name].as_int() for name in ("axis", "block_size"))
    name = str(values.name).removesuffix(INT4)
    if axis == 0:  # [inputs, outputs]
        rows, columns = columns, rows
        name = name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else name + SUFFIX
    stored = Stored("uint4", (rows, columns), 1, block)
    for old in (values, scales):
        del graph.initializers[str(old.name)]
    weights = [
        add_weight(graph, f"{name}{UINT4}", ir.DataType.UINT8, stored.values_shape),
        add_weight(graph, f"{name}{SCALES}", scales.dtype, stored.scales_shape),
    ]
    attributes = {"K": columns, "N": rows, "bits": 4, "block_size": block, "accuracy_level": FLOAT_ACTIVATIONS}
    added = [ir.node(OPERATOR, [node.inputs[0], *weights], attributes, domain=DOMAIN, name=node.name)]
    output = node.outputs[0]
    if len(node.inputs) > 2:
        product = added[0].outputs[0]
        product.name, product.shape, product.type = f"{output.name}.product", output.shape, output.type
        added.append(ir.node("Add", [product, node.inputs[2]], name=f"{node.name}.bias"))
    ir.convenience.replace_nodes_and_values(graph, node, [node, dequantize], added, [output], added[-1].outputs)
