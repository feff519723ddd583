"""Outputs beside a graph's own that tell how large the activations are that weights are multiplied with.

1. The input of a Conv, ConvTranspose, Gemm or MatMul with a constant weight is watched: its largest magnitude in every
   channel, and a sample of its values. Channels are axis 1 for convolutions, and the rows of the weight for products.
2. An activation that several weights are multiplied with is watched once.
3. All peaks lie in one output, all samples in another, in float32, in the order of `watched`.
4. Samples are strided, at most `SAMPLED` values, with a stride that has no divisor in common with the number of values:
   no channel, row or column is left out.
5. A graph without such weights stays as it is. The given graph is never changed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from toolchain.errors import ExportError
from toolchain.precision.collect import PEAKS, SAMPLES, Watched
from toolchain.precision.weight_only import CONVOLUTIONS, weighted

SAMPLED = 8192


@dataclass(frozen=True)
class _Activation:
    """An activation, its axis of channels, and the first node that multiplies it with a weight."""

    value: ir.Value
    axis: int
    reader: ir.Node

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.value.shape
        if shape is None or not shape.is_static():
            raise ExportError("an activation has no static shape", where=f"{self.reader.op_type} {self.reader.name}")
        return tuple(int(d) for d in shape.numpy())

    @property
    def stride(self) -> int:
        """Of its sample."""
        size = math.prod(self.shape)
        stride = math.ceil(size / SAMPLED)
        while math.gcd(stride, size) != 1:
            stride += 1
        return stride


def watched(model: ir.Model) -> tuple[Watched, ...]:
    """What `watch` adds outputs for. Raises ExportError for an activation without a static shape."""
    return tuple(
        Watched(tuple(names), a.shape[a.axis], math.ceil(math.prod(a.shape) / a.stride))
        for a, names in _activations(model)
    )


def watch(model: ir.Model) -> ir.Model:
    """A copy with the two outputs. Raises ExportError for an activation without a static shape."""
    model = model.clone()
    graph, added = model.graph, watched(model)
    peaks, samples = [], []
    for number, (activation, _) in enumerate(_activations(model)):
        name = f"watched.{number}"
        # Before what reads it, so that it need not be kept until the end.
        nodes = [*_peak(activation, name), *_sample(activation, name)]
        graph.insert_before(activation.reader, nodes)
        peaks.append(next(n for n in nodes if n.name == f"{name}.peaks").outputs[0])
        samples.append(nodes[-1].outputs[0])
    totals = (sum(w.channels for w in added), sum(w.samples for w in added))
    for name, parts, total in zip((PEAKS, SAMPLES), (peaks, samples), totals, strict=True) if peaks else ():
        node = ir.node("Concat", parts, {"axis": 0}, name=name)
        graph.append(node)
        graph.outputs.append(_typed(node, name, total))
    return model


def _activations(model: ir.Model) -> Sequence[tuple[_Activation, list[str]]]:
    """Every watched activation with the weights that it is multiplied with, in the order of the graph."""
    activations: dict[tuple[ir.Value, int], tuple[_Activation, list[str]]] = {}
    for name, node in weighted(model):
        value = node.inputs[0]
        assert value is not None
        if value.const_value is not None:  # nothing that changes with the prompt
            continue
        axis = _channels(node, value)
        _, names = activations.setdefault((value, axis), (_Activation(value, axis, node), []))
        names.append(name)
    return [*activations.values()]


def _channels(node: ir.Node, value: ir.Value) -> int:
    if node.op_type in CONVOLUTIONS:
        return 1
    flipped = node.attributes.get("transA")
    rank = 0 if value.shape is None else len(value.shape)
    return 0 if flipped is not None and flipped.as_int() else rank - 1


def _peak(activation: _Activation, name: str) -> list[ir.Node]:
    shape, axis = activation.shape, activation.axis
    size = ir.node("Abs", [activation.value], name=f"{name}.abs")
    _typed(size, f"{name}.abs", *shape, dtype=activation.value.dtype)
    others = [i for i in range(len(shape)) if i != axis]
    axes = _constant(f"{name}.axes", others)
    peak = ir.node("ReduceMax", [size.outputs[0], axes.outputs[0]], {"keepdims": 0}, name=f"{name}.max")
    _typed(peak, f"{name}.max", shape[axis], dtype=activation.value.dtype)
    return [size, axes, peak, _float32(peak, f"{name}.peaks", shape[axis])]


def _sample(activation: _Activation, name: str) -> list[ir.Node]:
    size, stride = math.prod(activation.shape), activation.stride
    constants = {
        part: _constant(f"{name}.{part}", [number])
        for part, number in (("flat", -1), ("start", 0), ("end", size), ("axis", 0), ("stride", stride))
    }
    flat, start, end, axis, step = (node.outputs[0] for node in constants.values())
    line = ir.node("Reshape", [activation.value, flat], name=f"{name}.line")
    _typed(line, f"{name}.line", size, dtype=activation.value.dtype)
    sample = ir.node("Slice", [line.outputs[0], start, end, axis, step], name=f"{name}.slice")
    count = math.ceil(size / stride)
    _typed(sample, f"{name}.slice", count, dtype=activation.value.dtype)
    return [*constants.values(), line, sample, _float32(sample, f"{name}.samples", count)]


def _constant(name: str, numbers: Sequence[int]) -> ir.Node:
    tensor = ir.tensor(np.array(numbers, np.int64), name=name)
    node = ir.node("Constant", [], {"value": tensor}, name=name)
    _typed(node, name, len(numbers), dtype=ir.DataType.INT64)
    return node


def _float32(node: ir.Node, name: str, count: int) -> ir.Node:
    """What a node computes in float32, so that all parts can be joined."""
    cast = ir.node("Cast", [node.outputs[0]], {"to": ir.DataType.FLOAT}, name=name)
    _typed(cast, name, count)
    return cast


def _typed(node: ir.Node, name: str, *shape: int, dtype: ir.DataType | None = ir.DataType.FLOAT) -> ir.Value:
    assert dtype is not None
    output = node.outputs[0]
    output.name, output.shape, output.type = name, ir.Shape(shape), ir.TensorType(dtype)
    return output
