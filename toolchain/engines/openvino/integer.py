"""Products in int8 in the midst of a graph in bfloat16, some of which is computed in float32.

OpenVINO 2026.4 rewrites a graph that has any QuantizeLinear, and fails to where it meets bfloat16.

1. QuantizeLinear, DequantizeLinear and the product are in float32. The integers that are multiplied are the same ones,
   and their sums are rounded to the graph's type right behind the product.
2. So are a Mul and an Add with constants, the last steps of a group norm. OpenVINO makes one kernel of them with what
   is around them, which computes in float32 in any case.
3. A graph without products of rounded activations is left alone, and so is one in float32.
"""

from __future__ import annotations

import onnx_ir as ir

from toolchain.graph.insert import Inserter, shape_of
from toolchain.precision.activations import quantized_products

FLOAT = ir.DataType.FLOAT
MOVES = frozenset({"Reshape", "Unsqueeze", "Squeeze", "Cast", "Identity"})


def in_float32(graph: ir.Model) -> ir.Model:
    """A copy of a graph whose weights and activations were quantised; what is in float32 stays as it is."""
    model = graph.clone()
    rounded = rounded_products(model)
    if not rounded:
        return model
    for node in rounded:
        if node.outputs[0].dtype != FLOAT:
            _widen_product(node)
    for node in list(model.graph):
        if node.op_type == "Add" and node.outputs[0].dtype != FLOAT:
            _widen_scaling(node)
    return model


def rounded_products(model: ir.Model) -> list[ir.Node]:
    """Every product of a weight in int8 with an activation that is rounded too."""
    return [node for _, node in quantized_products(model, "int8") if _pair(node) is not None]


def _pair(product: ir.Node) -> ir.Node | None:
    """The DequantizeLinear that a product reads a rounded activation from. It has a zero point, which weights lack."""
    node = product.inputs[0].producer() if product.inputs[0] is not None else None
    return node if node is not None and node.op_type == "DequantizeLinear" and len(node.inputs) == 3 else None


def _widen_product(node: ir.Node) -> None:
    """1"""
    pair = _pair(node)
    rounding = pair.inputs[0].producer() if pair is not None and pair.inputs[0] is not None else None
    assert pair is not None
    assert rounding is not None
    for part, position in ((rounding, 0), (rounding, 1), (pair, 1)):
        _read_wide(part, position)
    _set_float(pair)
    for position in range(1, len(node.inputs)):
        _widen_weight(node, position)
    _compute_wide(node)


def _widen_scaling(node: ir.Node) -> None:
    """2"""
    scaling = next((v.producer() for v in node.inputs if v is not None and not _is_constant(v)), None)
    if scaling is None or scaling.op_type != "Mul":
        return
    if len(scaling.outputs[0].uses()) != 1 or scaling.outputs[0].is_graph_output():
        return
    if any(sum(map(_is_constant, part.inputs)) != 1 for part in (scaling, node)):
        return
    for position in (0, 1):
        _read_wide(scaling, position)
    _set_float(scaling)
    for position in (0, 1):
        _read_wide(node, position)
    _compute_wide(node)


def _is_constant(value: ir.Value | None) -> bool:
    """Whether a value depends on no input of the graph, by way of what only moves it."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in MOVES:
            return node is not None and node.op_type == "Constant"
        value = node.inputs[0]
    return value is not None


def _widen_weight(node: ir.Node, position: int) -> None:
    """The weight or bias that a node reads at a position, in float32."""
    value = node.inputs[position]
    producer = value.producer() if value is not None else None
    if producer is not None and producer.op_type == "Transpose":
        _widen_weight(producer, 0)
        _set_float(producer)
    elif producer is not None and producer.op_type == "DequantizeLinear":
        _read_wide(producer, 1)
        _set_float(producer)
    else:
        _read_wide(node, position)


def _read_wide(node: ir.Node, position: int) -> None:
    """Puts a Cast to float32 before an input that has another type."""
    value = node.inputs[position]
    if value is not None and value.dtype != FLOAT:
        cast = Inserter(node).add("Cast", [value], shape_of(value), {"to": FLOAT}, dtype=FLOAT)
        node.replace_input_with(position, cast)


def _compute_wide(node: ir.Node) -> None:
    """Gives a node a result in float32, with a Cast to what its readers take behind it."""
    output = node.outputs[0]
    cast = ir.node("Cast", [output], {"to": output.dtype}, name=f"{node.name}.narrow")
    narrow = cast.outputs[0]
    narrow.shape, narrow.type = output.shape, output.type
    assert node.graph is not None
    ir.convenience.replace_all_uses_with(output, narrow, replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    node.graph.insert_after(node, cast)
    _set_float(node)


def _set_float(node: ir.Node) -> None:
    node.outputs[0].type = ir.TensorType(FLOAT)
