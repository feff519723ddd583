"""Exported graphs in the form that OpenVINO is given, which decides the weight file.

Weights stay as they were exported: OpenVINO wants those of products transposed, as torch has them. In bfloat16 OpenVINO
2026.4 copies some of them into each exported model, as many as there are buckets, unless their nodes are written
otherwise:

1. A Gemm that does nothing more is a MatMul and an Add. In SD 1.5 at half width that leaves out 27 MB for each bucket,
   in transformers all of their modulations.
2. A division or a product by one, which diffusers has for factors that are one in every published model, is left out.
   It would be multiplied into the weight of the product or the convolution beside it, whose result is a new one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

PLAIN = {"alpha": 1.0, "beta": 1.0, "transA": 0}
"""Attributes of a Gemm with which MatMul and Add are the same."""


def prepare(graph: ir.Model) -> ir.Model:
    """A copy in an opset that knows bfloat16 where the graph has such values, of nodes whose weights are not copied."""
    from toolchain.graph.opset import allow_bfloat16

    return _without_gemm(_without_ones(allow_bfloat16(graph)))


def finish(graph: ir.Model) -> ir.Model:
    """The graph with products in int8 as OpenVINO compiles them, and with convolutions before upsampling."""
    from toolchain.engines.openvino.integer import in_float32
    from toolchain.graph.upsample import fold_upsampling

    return fold_upsampling(in_float32(graph))


def _without_ones(model: ir.Model) -> ir.Model:
    """A copy without divisions and products by one."""
    import onnx_ir as ir

    model = model.clone()
    for node in list(model.graph):
        if node.op_type not in ("Div", "Mul") or node.outputs[0].is_graph_output():
            continue
        x, factor = node.inputs
        if x is not None and _is_one(factor):
            ir.convenience.replace_all_uses_with(node.outputs[0], x)
            model.graph.remove(node, safe=True)
    return model


def _is_one(value: ir.Value | None) -> bool:
    import onnx_ir as ir

    from toolchain.graph.placeholder import is_weight

    if value is None or is_weight(value):
        return False
    tensor = ir.convenience.get_const_tensor(value)
    return tensor is not None and tensor.shape.rank() == 0 and float(tensor.numpy()) == 1


def _without_gemm(model: ir.Model) -> ir.Model:
    """A copy with MatMul and Add in place of each Gemm that does nothing more."""
    import onnx_ir as ir

    model = model.clone()
    for node in list(model.graph):
        if node.op_type != "Gemm" or any(PLAIN.get(name, a.value) != a.value for name, a in node.attributes.items()):
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
