"""Exported graphs in the form that ONNX Runtime on the CPU is given, which decides the weight file."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir


def prepare(graph: ir.Model) -> ir.Model:
    """The graph with the weights of its products transposed, once for all buckets."""
    from toolchain.graph.transpose import transpose_weights

    return transpose_weights(graph)


def finish(graph: ir.Model) -> ir.Model:
    """The graph with uint8 activations and with convolutions as products, whose weights are stored accordingly; with
    ONNX Runtime's own product for weights in int4."""
    from toolchain.engines.onnxruntime.integer import as_products
    from toolchain.precision.nbits import use_matmul_nbits

    return use_matmul_nbits(as_products(graph))
