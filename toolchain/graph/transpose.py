"""MatMul(x, Transpose(W)) -> MatMul(x, W.T): the transposed weight is stored, so that no engine computes and keeps it.

1. A Transpose with perm [1, 0] of a weight that only MatMuls read is removed; the weight is marked as transposed.
2. A weight that is read both ways keeps its own copy beside the transposed one.
3. A Transpose of something that is not a weight, or with another perm, is left alone.
"""

from __future__ import annotations

import onnx_ir as ir

from toolchain.graph.placeholder import add_weight, is_weight, static_shape

SUFFIX = ".transposed"


def transpose_weights(model: ir.Model) -> ir.Model:
    """A copy in which transposed weights are initializers of their own, named with `SUFFIX`."""
    model = model.clone()
    graph = model.graph
    for node in list(graph):
        perm = node.attributes.get("perm")
        if (
            node.op_type != "Transpose"
            or not is_weight(node.inputs[0])
            or perm is None
            or list(perm.as_ints()) != [1, 0]
        ):
            continue
        weight, output = node.inputs[0], node.outputs[0]
        assert weight is not None
        tensor = weight.const_value
        assert isinstance(tensor, ir.ExternalTensor)
        assert weight.name is not None
        name = weight.name + SUFFIX
        transposed = graph.initializers.get(name)
        if transposed is None:
            rows, columns = static_shape(tensor)
            transposed = add_weight(graph, name, tensor.dtype, (columns, rows))
        ir.convenience.replace_all_uses_with(output, transposed)
        graph.remove(node, safe=True)
        if not weight.uses():
            del graph.initializers[weight.name]
    return model
