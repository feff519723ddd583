"""What is float32 on both sides of a narrower type stays float32: no rounding between modules kept in float32.

Casts stand around each of these modules, and the wrappers around a network narrow what they give it and widen what they
get. Where one meets the other, a value would be rounded for nobody's sake: kept `conv_out` would give float16 to a
guidance in float32. The numbers are the tests'.

1. float32 -> float16 or bfloat16 -> float32 is the value itself.
2. So it is with operators in between that only move values: they move float32 instead.
3. Where several are joined, all of them must come from float32.
4. An operator that computes in the narrower type is left alone, and who else uses the narrow value keeps it.
5. A cast that widens what was never float32 is left alone, and so is one to another type than float32.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

LOW = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
MOVES = frozenset(
    {"Concat", "Expand", "Flatten", "Gather", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
"""Of these the first input is moved, and the others say how; of Concat all are."""


def drop_round_trips(model: ir.Model) -> ir.Model:
    """Removes the round trips in place; the values must have types. Returns the model.

    For graphs with modules kept in float32: elsewhere, as in FLUX's rotary embedding, a model rounds by its own design.
    """
    origins: dict[ir.Value, ir.Value | None] = {}
    for node in list(model.graph):
        value = node.inputs[0] if _casts(node, ir.DataType.FLOAT) else None
        wide = None if value is None or value.dtype not in LOW else _wide(value, origins)
        if wide is not None:
            same = ir.node("Identity", [wide])
            same.outputs[0].shape, same.outputs[0].type = node.outputs[0].shape, node.outputs[0].type
            ir.convenience.replace_nodes_and_values(model.graph, node, [node], [same], node.outputs, same.outputs)
    common.IdentityEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return model


def _casts(node: ir.Node, *dtypes: ir.DataType) -> bool:
    return node.op_type == "Cast" and not node.domain and node.attributes["to"].as_int() in dtypes


def _wide(value: ir.Value, origins: dict[ir.Value, ir.Value | None]) -> ir.Value | None:
    """The float32 value that a narrow one was rounded from, moved likewise; None where there is none."""
    if value not in origins:
        origins[value] = None
        node = value.producer()
        if node is not None and _casts(node, *LOW):
            source = node.inputs[0]
            origins[value] = source if source is not None and source.dtype is ir.DataType.FLOAT else None
        elif node is not None and node.op_type in MOVES and not node.domain:
            _move(node, origins)
    return origins[value]


def _move(node: ir.Node, origins: dict[ir.Value, ir.Value | None]) -> None:
    """The same node over float32, if all that it moves comes from there."""
    count = len(node.inputs) if node.op_type == "Concat" else 1
    sources = [None if value is None else _wide(value, origins) for value in node.inputs[:count]]
    if None in sources:
        return
    # Without the name: the node itself stays, where somebody needs the narrow value.
    moved = ir.node(node.op_type, [*sources, *node.inputs[count:]], node.attributes, num_outputs=len(node.outputs))
    for narrow, wide in zip(node.outputs, moved.outputs, strict=True):
        wide.shape, wide.type = narrow.shape, ir.TensorType(ir.DataType.FLOAT)
        origins[narrow] = wide
    assert node.graph is not None
    node.graph.insert_after(node, moved)
