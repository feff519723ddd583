"""A graph says that it is of the opset that allows what it does.

1. A graph with a bfloat16 Conv, ConvTranspose or InstanceNormalization below opset 22 is marked as opset 22: ONNX gave
   them bfloat16 there, and the exporter writes them whatever the opset is. To the other operators that it writes, the
   opsets 21 and 22 only add types.
2. GroupNormalization means something else from opset 21 on: a graph that has one is left alone.
3. A graph without these operators in bfloat16 is left alone.
4. Any other graph that needs a newer opset gets it from `raise_opset`, which refuses one with a GroupNormalization.
"""

from __future__ import annotations

import onnx_ir as ir

from toolchain.errors import ExportError

OPSET = 22
CHANGED = "GroupNormalization"
CHANGED_IN = 21
LATE = frozenset({"Conv", "ConvTranspose", "InstanceNormalization"})


def allow_bfloat16(model: ir.Model) -> ir.Model:
    """The model itself, or a copy with a newer opset where its bfloat16 operators need one."""
    nodes = list(model.graph)
    inputs = [value for node in nodes if node.op_type in LATE for value in node.inputs if value is not None]
    needed = any(value.dtype is ir.DataType.BFLOAT16 for value in inputs)
    if not needed or model.opset_imports[""] >= OPSET or any(n.op_type == CHANGED for n in nodes):
        return model
    model = model.clone()
    model.opset_imports[""] = OPSET
    return model


def raise_opset(model: ir.Model, opset: int) -> ir.Model:
    """A copy that is of `opset` at least; of 22 at most. Raises ExportError where an operator means something else."""
    model = model.clone()
    before = model.opset_imports[""]
    if before < CHANGED_IN <= opset and any(node.op_type == CHANGED for node in model.graph):
        raise ExportError(
            f"{CHANGED} means something else from opset {CHANGED_IN} on",
            where=model.graph.name,
            expected=f"a graph without it, or of opset {CHANGED_IN}",
            got=f"opset {before}",
        )
    model.opset_imports[""] = max(before, opset)
    return model
