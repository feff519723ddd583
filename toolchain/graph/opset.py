"""A bfloat16 graph says that it is of the opset that allows what it does in bfloat16.

1. A graph with a bfloat16 Conv, ConvTranspose or InstanceNormalization below opset 22 is marked as opset 22: ONNX gave
   them bfloat16 there, and the exporter writes them whatever the opset is. To the other operators that it writes, the
   opsets 21 and 22 only add types.
2. GroupNormalization means something else from opset 21 on: a graph that has one is left alone.
3. A graph without these operators in bfloat16 is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

OPSET = 22
LATE = frozenset({"Conv", "ConvTranspose", "InstanceNormalization"})


def allow_bfloat16(model: ir.Model) -> ir.Model:
    """The model itself, or a copy with a newer opset where its bfloat16 operators need one."""
    nodes = list(model.graph)
    inputs = [value for node in nodes if node.op_type in LATE for value in node.inputs if value is not None]
    needed = any(value.dtype is ir.DataType.BFLOAT16 for value in inputs)
    if not needed or model.opset_imports[""] >= OPSET or any(n.op_type == "GroupNormalization" for n in nodes):
        return model
    model = model.clone()
    model.opset_imports[""] = OPSET
    return model
