"""A bfloat16 graph says that it is of the opset that allows bfloat16 convolutions.

1. A graph with a bfloat16 Conv or ConvTranspose below opset 22 is marked as opset 22: ONNX gave convolutions bfloat16
   there, and the exporter writes them whatever the opset is. Of the operators that it writes, the opsets 21 and 22 only
   add types to the others.
2. GroupNormalization means something else from opset 21 on: a graph that has one is left alone.
3. A graph without bfloat16 convolutions is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

BFLOAT16_CONV = 22


def allow_bfloat16(model: ir.Model) -> ir.Model:
    """The model itself, or a copy of it under another opset."""
    nodes = list(model.graph)
    convolutions = [node for node in nodes if node.op_type in ("Conv", "ConvTranspose")]
    wanted = any(v is not None and v.dtype is ir.DataType.BFLOAT16 for node in convolutions for v in node.inputs)
    if not wanted or model.opset_imports[""] >= BFLOAT16_CONV or any(n.op_type == "GroupNormalization" for n in nodes):
        return model
    model = model.clone()
    model.opset_imports[""] = BFLOAT16_CONV
    return model
