"""Exported graphs in the form that TensorRT's parser takes, which decides the weight file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def prepare(graph: ir.Model) -> ir.Model:
    """The graph in an opset that knows bfloat16, where it has such values."""
    from toolchain.graph.opset import allow_bfloat16

    return allow_bfloat16(graph)


def finish(graph: ir.Model) -> ir.Model:
    """The graph itself: TensorRT reads pairs of QuantizeLinear and DequantizeLinear as they are."""
    return graph
