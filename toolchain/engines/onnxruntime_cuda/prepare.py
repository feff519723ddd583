"""Exported graphs in the form that ONNX Runtime on a GPU is given, which decides the weight file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def prepare(graph: ir.Model) -> ir.Model:
    """The graph with the weights of its products transposed, and ArgMax on floats."""
    from toolchain.graph.transpose import transpose_weights

    return _float_argmax(transpose_weights(graph))


def finish(graph: ir.Model) -> ir.Model:
    """The graph itself: nothing is quantised for this backend."""
    return graph


def _float_argmax(model: ir.Model) -> ir.Model:
    """CUDA's ArgMax takes floats alone. CLIP finds the end of a prompt with it, in token ids: exact in float32."""
    import onnx_ir as ir

    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "ArgMax" else None
        if value is not None and value.dtype in (ir.DataType.INT32, ir.DataType.INT64):
            as_float = ir.Value(name=f"{value.name}_float", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[as_float], name=f"{node.name}_float")
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, as_float)
    return model
