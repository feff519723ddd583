"""Inline functions, fold what is constant, drop what is unused; leave every node that a weight feeds alone.

1. A function call is inlined.
2. A node whose inputs are small constants is replaced by its value.
3. A node that a weight feeds is not folded, even where all its inputs are constant: weights have no values here.
4. Nodes and initializers that nothing uses are removed; equal nodes are merged.
5. An Einsum that only permutes is a Transpose.
6. Where torch promoted a type in silence there is a Cast.
7. What NVIDIA's parsers do not take in bfloat16 has casts around it.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from toolchain.graph.einsum import transpose_einsums
from toolchain.graph.placeholder import is_weight
from toolchain.graph.promote import promote_types
from toolchain.graph.widen import widen_operators

# A folded value is written into the graph of every bucket, so it must stay small: 4 MiB holds a 1024x1024 mask.
INPUT_LIMIT_BYTES = 1 << 20
OUTPUT_LIMIT_BYTES = 4 << 20


def _should_fold(node: ir.Node) -> bool | None:
    return False if any(is_weight(value) for value in node.inputs) else None


def simplify(model: ir.Model) -> ir.Model:
    """A simplified copy; the weights are shared with the given model."""
    model = model.clone()
    common.InlinePass()(model)
    transpose_einsums(model)
    promote_types(model)  # before the types that torch computed are inferred anew
    # First as well: equal nodes folded one by one would each leave a copy of the value. FLUX uses its tables 228 times.
    common.CommonSubexpressionEliminationPass()(model)
    for _ in range(2):  # the second round folds what the first one uncovered; a third changed nothing on SD and SDXL
        optimizer.fold_constants(
            model,
            should_fold=_should_fold,
            input_size_limit=INPUT_LIMIT_BYTES,
            output_size_limit=OUTPUT_LIMIT_BYTES,
            onnx_shape_inference=True,
        )
        common.RemoveUnusedNodesPass()(model)
    widen_operators(model)  # here, where every value has a type
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedFunctionsPass()(model)  # type: ignore[no-untyped-call]
    common.ClearMetadataAndDocStringPass()(model)  # the exporter's stack traces are half of a graph's bytes
    common.RemoveUnusedOpsetsPass()(model)
    return model
