"""X -> QuantizeLinear -> DequantizeLinear -> product: activations in eight bits where quantised weights meet them.

Symmetric int8 with one scale per tensor, in the activation's own float type. The zero point is written out: without one
QuantizeLinear makes uint8.

1. The activation that a Conv, ConvTranspose, Gemm or MatMul multiplies with a quantised weight is read through a pair.
2. All readers of one activation share its pair, as the projections to query, key and value do. Its scale is the largest
   of theirs.
3. Whoever reads the activation with a weight that was left alone, or without one, reads it as it was.
4. What reads a pair already is left alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from math import isfinite

import numpy as np
import onnx_ir as ir

from toolchain.errors import CalibrationError
from toolchain.graph.insert import shared_constant
from toolchain.graph.placeholder import is_weight
from toolchain.graph.transpose import SUFFIX
from toolchain.precision.ranges import Ranges
from toolchain.precision.rounding import LARGEST
from toolchain.precision.weight_only import VALUES

ZERO = "zero.int8"
TINY = float(np.finfo(np.float16).tiny)
"""The least scale in float16 that is not rounded to a few bits."""


def quantized_products(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Every node that multiplies with a weight in int8, and the name of that weight in the checkpoint."""
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if value is None or not is_weight(value) or not str(value.name).endswith(VALUES):
            continue
        name = str(value.name).removesuffix(VALUES).removesuffix(SUFFIX)
        for reader, _ in node.outputs[0].uses():
            turned = reader.op_type == "Transpose"
            yield name, next(r for r, _ in reader.outputs[0].uses()) if turned else reader


def activation_scales(ranges: Ranges, weights: Iterable[str], method: str) -> dict[str, float]:
    """By the name of the weight: what an int8 of 1 stands for in the activation that it is multiplied with.

    method  as `parse_method` takes it

    Raises CalibrationError with every weight whose activation has no range, or one that is no use.
    """
    scales, problems = {}, []
    for name in weights:
        seen = ranges.get(name)
        largest = None if seen is None else seen.largest(method)
        if largest is None:
            problems.append(f"{name}: was not watched")
        elif not isfinite(largest):
            problems.append(f"{name}: its input reached {largest}")
        elif largest <= 0:
            problems.append(f"{name}: its input was never anything but zero")
        else:
            scales[name] = largest / LARGEST
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CalibrationError(
            "the inputs of weights that are to be multiplied in int8 have no range:\n    " + "\n    ".join(shown),
            hint="calibrate this model again, or name the modules in quantize.exclude",
        )
    return scales


def quantize_activations(model: ir.Model, scales: Mapping[str, float]) -> ir.Model:
    """A copy that rounds the inputs of all products with int8 weights to int8; `scales` are `activation_scales`."""
    model = model.clone()
    readers: dict[ir.Value, dict[ir.Node, float]] = {}
    for name, node in quantized_products(model):
        value = node.inputs[0]
        assert value is not None
        before = value.producer()
        if before is None or before.op_type != "DequantizeLinear":
            readers.setdefault(value, {})[node] = scales[name]
    order = {node: index for index, node in enumerate(model.graph)}
    for value, nodes in readers.items():
        rounded = _round(model.graph, value, max(nodes.values()), before=min(nodes, key=order.__getitem__))
        for node in nodes:
            node.replace_input_with(0, rounded)
    return model


def _round(graph: ir.Graph, value: ir.Value, scale: float, before: ir.Node) -> ir.Value:
    """Puts a pair in front of a node and returns what it writes."""
    assert value.dtype is not None
    least = TINY if value.dtype == ir.DataType.FLOAT16 else 0.0
    steps = np.array(max(scale, least)).astype(value.dtype.numpy())
    scales = shared_constant(graph, f"{value.name}.scale", steps)
    constants = [scales, shared_constant(graph, ZERO, np.array(0, np.int8))]
    integers = _insert(before, "QuantizeLinear", [value, *constants], f"{value.name}.int8", ir.DataType.INT8)
    return _insert(before, "DequantizeLinear", [integers, *constants], f"{value.name}.rounded", value.dtype)


def _insert(before: ir.Node, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType) -> ir.Value:
    """A node in front of another, whose output has the shape of its first input."""
    node = ir.node(op, inputs, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, inputs[0].shape, ir.TensorType(dtype)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output
