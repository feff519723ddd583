"""Checks a graph against ONNX's typing rules: the inputs of every operator, and every inferred shape.

What a backend would refuse later, in its own words, is reported here with node, operator and types.
"""

from __future__ import annotations

import re

import onnx_ir as ir

from toolchain.errors import ExportError

NODE = re.compile(r"\(op_type:\s*(?P<op>\w+)(?:, node name:\s*(?P<name>[^)]*))?\):\s*(?P<why>.*)")
"""How onnx names the node at which inference ended."""


def check_types(model: ir.Model) -> None:
    """Strict type and shape inference; weights are placeholders. ExportError for the first error."""
    import onnx

    try:
        onnx.shape_inference.infer_shapes(ir.to_proto(model), check_type=True, strict_mode=True, data_prop=True)
    except (onnx.shape_inference.InferenceError, ValueError) as error:
        match = NODE.search(str(error))
        where = f"{model.graph.name}, opset {model.opset_imports.get('')}"
        nodes = [n for n in model.graph if match and (n.op_type, n.name or "") == (match["op"], match["name"] or "")]
        raise ExportError(
            f"the graph breaks ONNX's rules of types and shapes: {match['why'] if match else error}",
            where=f"{where}, {nodes[0].op_type} {nodes[0].name}" if nodes else where,
            got=_described(nodes[0]) if nodes else None,
            hint="no backend would take it; report it with what diffbuild doctor prints",
        ) from error


def _described(node: ir.Node) -> str:
    inputs, outputs = (", ".join(map(_value, values)) for values in (node.inputs, node.outputs))
    return f"{inputs} -> {outputs}"


def _value(value: ir.Value | None) -> str:
    if value is None:
        return "nothing"
    dtype = "untyped" if value.dtype is None else {"FLOAT": "float32"}.get(value.dtype.name, value.dtype.name.lower())
    return f"{value.name} {dtype}{'' if value.shape is None else value.shape}"
