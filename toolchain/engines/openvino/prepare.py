"""Exported graphs in the form that OpenVINO is given, which decides the weight file.

Weights stay as they were exported: OpenVINO wants those of products transposed, as torch has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def prepare(graph: ir.Model) -> ir.Model:
    """The graph in an opset that knows bfloat16 where it has such values, and without Gemm."""
    from toolchain.graph.opset import allow_bfloat16

    return _without_gemm(allow_bfloat16(graph))


def prepare_quantized(graph: ir.Model) -> ir.Model:
    """The graph itself: nothing is quantised for this backend."""
    return graph


def _without_gemm(model: ir.Model) -> ir.Model:
    """A copy with MatMul and Add in place of each Gemm that does nothing more.

    OpenVINO 2026.4 copies the weight of a Gemm in bfloat16 into each exported model, that of a MatMul it refers to:
    27 MB for each bucket of SD 1.5 at half width, and all of the modulations of a transformer.
    """
    import onnx_ir as ir

    model = model.clone()
    for node in list(model.graph):
        if node.op_type != "Gemm" or any(name != "transB" and a.value != 1 for name, a in node.attributes.items()):
            continue
        x, weight, *bias = node.inputs
        name, output = node.name, node.outputs[0]
        nodes = []
        if node.attributes.get_int("transB", 0):
            nodes.append(ir.node("Transpose", [weight], {"perm": [1, 0]}, name=f"{name}.transposed"))
            weight = nodes[-1].outputs[0]
        nodes.append(ir.node("MatMul", [x, weight], name=name))
        if bias:
            nodes.append(ir.node("Add", [nodes[-1].outputs[0], bias[0]], name=f"{name}.bias"))
        for new in nodes:
            new.outputs[0].type = output.type
            new.outputs[0].name = f"{new.name}.out"
        nodes[-1].outputs[0].shape = output.shape
        ir.convenience.replace_nodes_and_values(model.graph, node, [node], nodes, [output], [nodes[-1].outputs[0]])
    return model
