"""Einsum("abc->acb", x) -> Transpose(x): ONNX lets Einsum take bfloat16 in no opset, and Transpose in all of ours.

1. An Einsum of one operand whose letters are the same on both sides, each once, is a Transpose.
2. Any other Einsum is left alone.
"""

from __future__ import annotations

import onnx_ir as ir


def transpose_einsums(model: ir.Model) -> ir.Model:
    """Replaces permuting Einsums in place; returns the model."""
    for node in list(model.graph):
        perm = _permutation(node) if node.op_type == "Einsum" and len(node.inputs) == 1 else None
        if perm is not None:
            transpose = ir.node("Transpose", node.inputs, {"perm": perm}, name=node.name)
            ir.convenience.replace_nodes_and_values(
                model.graph, node, [node], [transpose], node.outputs, transpose.outputs
            )
    return model


def _permutation(node: ir.Node) -> list[int] | None:
    before, arrow, after = node.attributes["equation"].as_string().replace(" ", "").partition("->")
    letters = sorted(before)
    if not arrow or letters != sorted(after) or len(set(letters)) < len(letters) or not before.isalpha():
        return None
    return [before.index(letter) for letter in after]
