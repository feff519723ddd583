"""What a parser takes in float32 and not in bfloat16 is computed in float32, as torch does inside such an operator.

ONNX has Mish in bfloat16 only since opset 22, and NVIDIA's parsers have it in none. The numbers are the tests'.

1. An operator that a parser of NVIDIA's takes in float32 but not in bfloat16 has casts around it: bfloat16 inputs are
   widened, bfloat16 outputs narrowed.
2. An operator that they take in bfloat16 is left alone, and so is one in another type.
3. An operator of another domain is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from toolchain.graph.parser_tables import NO_BFLOAT16

NARROW, WIDE = ir.DataType.BFLOAT16, ir.DataType.FLOAT


def widen_operators(model: ir.Model) -> ir.Model:
    """Inserts the Casts in place; returns the model."""
    for node in list(model.graph):
        values = (*node.inputs, *node.outputs)
        if not node.domain and node.op_type in NO_BFLOAT16 and any(v is not None and v.dtype is NARROW for v in values):
            nodes, outputs = _widened(node)
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, node.outputs, outputs)
    return model


def _widened(node: ir.Node) -> tuple[list[ir.Node], list[ir.Value]]:
    """The nodes in place of one, and the values in place of its outputs."""
    before = {value: _cast(value, WIDE) for value in node.inputs if value is not None and value.dtype is NARROW}
    inputs = [before[value].outputs[0] if value in before else value for value in node.inputs]
    wide = ir.node(node.op_type, inputs, node.attributes, num_outputs=len(node.outputs), name=node.name)
    after, outputs = [], []
    for old, new in zip(node.outputs, wide.outputs, strict=True):
        narrow = old.dtype is NARROW
        new.shape, new.type = old.shape, ir.TensorType(WIDE) if narrow else old.type
        after += [_cast(new, NARROW)] if narrow else []
        outputs.append(after[-1].outputs[0] if narrow else new)
    return [*before.values(), wide, *after], outputs


def _cast(value: ir.Value, dtype: ir.DataType) -> ir.Node:
    cast = ir.node("Cast", [value], {"to": dtype})
    cast.outputs[0].shape, cast.outputs[0].type = value.shape, ir.TensorType(dtype)
    return cast
