"""X -> QuantizeLinear -> DequantizeLinear -> product: activations in eight bits where quantised weights meet them.

Symmetric int8, or float8 beside weights in float8, with one scale per tensor, in the activation's own float type. The
zero point is written out: without one QuantizeLinear makes uint8. Scales are placeholders as weights are;
`precision.changes` computes them.

1. The activation that a Conv, ConvTranspose, Gemm or MatMul multiplies with a quantised weight is read through a pair.
2. All readers of one activation share its pair and its scale, as the projections to query, key and value do.
3. Whoever reads the activation with a weight that was left alone, or without one, reads it as it was.
4. What reads a pair already is left alone, and so is a constant.
5. Smoothing (SmoothQuant): the inputs of matrix products are divided by a number for each channel, and the weights
   multiplied with it. A norm before them, which nobody else reads, has it in its weights; elsewhere it is a Mul.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from toolchain.graph.insert import shape_of, shared_constant
from toolchain.graph.placeholder import is_weight, placeholder
from toolchain.graph.transpose import SUFFIX
from toolchain.precision.stored import DTYPES, SCALES, Bits

ROUNDED: tuple[Bits, ...] = ("int8", "float8")
"""What activations can be rounded to, beside weights of the same type."""
SCALE, FACTORS = f".input{SCALES}", ".input.factors"


@dataclass(frozen=True)
class Rounded:
    """An activation that is rounded.

    weights    that it is multiplied with, by their names in the checkpoint
    dtype      its type
    bits       what it is rounded to
    smoothing  whether each channel is divided by a number of its own, and where
    norm       initializers that hold it where it is "folded"
    """

    weights: tuple[str, ...]
    dtype: ir.DataType
    bits: Bits
    smoothing: Literal["none", "multiplied", "folded"]
    norm: tuple[str, ...] = ()

    @property
    def scale(self) -> str:
        """The initializer of its scale, whose name is the same in all buckets."""
        return self.weights[0] + SCALE

    @property
    def factors(self) -> str:
        """The initializer that it is multiplied with."""
        return self.weights[0] + FACTORS


@dataclass(frozen=True)
class _Group:
    """An activation, the products that read it with quantised weights, the first of them first."""

    value: ir.Value
    readers: tuple[ir.Node, ...]
    rounded: Rounded


def quantized_products(model: ir.Model, bits: Bits) -> Iterator[tuple[str, ir.Node]]:
    """Every node that multiplies with a weight in such bits, and the name of that weight in the checkpoint."""
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if value is None or not is_weight(value) or not str(value.name).endswith(f".{bits}"):
            continue
        name = str(value.name).removesuffix(f".{bits}").removesuffix(SUFFIX)
        for reader, _ in node.outputs[0].uses():
            turned = reader.op_type == "Transpose"
            yield name, next(r for r, _ in reader.outputs[0].uses()) if turned else reader


def rounded_activations(model: ir.Model, *, smooth: bool) -> list[Rounded]:
    """What `quantize_activations` rounds in a graph whose weights were quantised."""
    return [group.rounded for group in _groups(model, smooth)]


def added_names(model: ir.Model) -> set[str]:
    """The placeholders that `quantize_activations` added to a graph."""
    return {str(name) for name in model.graph.initializers if str(name).endswith((SCALE, FACTORS))}


def quantize_activations(model: ir.Model, *, smooth: bool) -> ir.Model:
    """A copy that rounds the inputs of all products with weights in int8 or float8 to the same."""
    model = model.clone()
    for group in _groups(model, smooth):
        value, before = group.value, group.readers[0]
        if group.rounded.smoothing == "multiplied":
            factors = _placeholder(model.graph, group.rounded.factors, group.rounded.dtype, (_inputs(before),))
            value = _insert(before, "Mul", [value, factors], f"{value.name}.smoothed", group.rounded.dtype)
        scale = _placeholder(model.graph, group.rounded.scale, group.rounded.dtype, ())
        bits, dtype = group.rounded.bits, DTYPES[group.rounded.bits]
        constants = [scale, shared_constant(model.graph, f"zero.{bits}", np.array(0).astype(dtype.numpy()))]
        narrow = _insert(before, "QuantizeLinear", [value, *constants], f"{value.name}.{bits}", dtype)
        kept = _insert(before, "DequantizeLinear", [narrow, *constants], f"{value.name}.kept", group.rounded.dtype)
        for node in group.readers:
            node.replace_input_with(0, kept)
    return model


def _groups(model: ir.Model, smooth: bool) -> list[_Group]:
    return [group for bits in ROUNDED for group in _groups_of(model, bits, smooth)]


def _groups_of(model: ir.Model, bits: Bits, smooth: bool) -> list[_Group]:
    order = {node: index for index, node in enumerate(model.graph)}
    readers: dict[ir.Value, dict[ir.Node, str]] = {}
    for name, node in quantized_products(model, bits):
        value = node.inputs[0]
        before = value.producer() if value is not None else None
        if value is None or value.const_value is not None or (before and before.op_type == "DequantizeLinear"):
            continue
        readers.setdefault(value, {})[node] = name
    groups = []
    for value, names in readers.items():
        nodes = tuple(sorted(names, key=order.__getitem__))
        products = all(node.op_type == "MatMul" or (node.op_type == "Gemm" and not _flipped(node)) for node in nodes)
        norm = _norm(value, nodes) if smooth and products else ()
        assert value.dtype is not None
        smoothing: Literal["none", "multiplied", "folded"]
        smoothing = "none" if not (smooth and products) else "folded" if norm else "multiplied"
        groups.append(_Group(value, nodes, Rounded(tuple(sorted(names.values())), value.dtype, bits, smoothing, norm)))
    return groups


def _flipped(gemm: ir.Node) -> bool:
    return gemm.attributes.get_int("transA", 0) != 0


def _norm(value: ir.Value, readers: tuple[ir.Node, ...]) -> tuple[str, ...]:
    """The weights of a norm, one number for each channel, whose output nobody but the readers reads."""
    norm = value.producer()
    alone = not value.is_graph_output() and all(node in readers for node, _ in value.uses())
    if norm is None or not alone or norm.op_type not in ("LayerNormalization", "Mul"):
        return ()
    # The last step of a norm that was taken apart is a Mul with its weight.
    inputs = norm.inputs[1:] if norm.op_type == "LayerNormalization" else [v for v in norm.inputs if is_weight(v)]
    weights = [v for v in inputs if v is not None]
    fits = all(is_weight(v) and shape_of(v) == (_inputs(readers[0]),) and len(v.uses()) == 1 for v in weights)
    return tuple(str(v.name) for v in weights) if fits else ()


def _inputs(product: ir.Node) -> int:
    """How many inputs the quantised matrix of a product has. Of the activation, a graph of several buckets has no
    shape."""
    value = product.inputs[1]
    widened = value.producer() if value is not None else None
    if widened is not None and widened.op_type == "Transpose" and widened.inputs[0] is not None:
        widened = widened.inputs[0].producer()
    assert widened is not None
    assert widened.inputs[0] is not None
    return shape_of(widened.inputs[0])[1 - widened.attributes["axis"].as_int()]


def _insert(before: ir.Node, op: str, inputs: list[ir.Value], name: str, dtype: ir.DataType) -> ir.Value:
    """A node in front of another, whose output has the shape of its first input."""
    node = ir.node(op, inputs, name=name)
    output = node.outputs[0]
    output.name, output.shape, output.type = name, inputs[0].shape, ir.TensorType(dtype)
    assert before.graph is not None
    before.graph.insert_before(before, node)
    return output


def _placeholder(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype))
    value.const_value = placeholder(name, dtype, shape)
    graph.register_initializer(value)
    return value
