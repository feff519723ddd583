"""An output beside a graph's own that tells how large the activations are that weights are multiplied with.

1. The input of a Conv, ConvTranspose, Gemm or MatMul with a constant weight is watched: its largest magnitude in every
   channel, and a sample of its values. Channels are axis 1 for convolutions, and the rows of the weight for products.
2. An activation that several weights are multiplied with is watched once.
3. All of it lies in one output, in float32: peaks, then samples of each activation, in the order of `watched`.
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
from toolchain.graph.insert import Inserter, shape_of
from toolchain.precision.collect import WATCHED, Watched
from toolchain.precision.weight_only import CONVOLUTIONS, weighted

SAMPLED = 8192
FLOAT32 = ir.TensorType(ir.DataType.FLOAT)


@dataclass(frozen=True)
class _Activation:
    """An activation, its axis of channels, and the first node that multiplies it with a weight."""

    value: ir.Value
    axis: int
    reader: ir.Node

    @property
    def shape(self) -> tuple[int, ...]:
        shape = shape_of(self.value)
        if not shape:
            raise ExportError("an activation has no static shape", where=f"{self.reader.op_type} {self.reader.name}")
        return shape

    @property
    def stride(self) -> int:
        """Of its sample."""
        size = math.prod(self.shape)
        stride = math.ceil(size / SAMPLED)
        while math.gcd(stride, size) != 1:
            stride += 1
        return stride


def watched(model: ir.Model) -> tuple[Watched, ...]:
    """What the output that `watch` adds is of. Raises ExportError for an activation without a static shape."""
    return tuple(
        Watched(tuple(names), a.shape[a.axis], math.ceil(math.prod(a.shape) / a.stride))
        for a, names in _activations(model)
    )


def watch(model: ir.Model) -> ir.Model:
    """A copy with the output. Raises ExportError for an activation without a static shape."""
    model = model.clone()
    graph = model.graph
    parts: list[ir.Value] = []
    for activation, _ in _activations(model):
        before = Inserter(activation.reader)  # there, so that the activation need not be kept until the end
        parts += [_peaks(activation, before), _sample(activation, before)]
    if parts:
        node = ir.node("Concat", parts, {"axis": 0}, name=WATCHED)
        output, total = node.outputs[0], sum(shape_of(part)[0] for part in parts)
        output.name, output.shape, output.type = WATCHED, ir.Shape([total]), FLOAT32
        graph.append(node)
        graph.outputs.append(output)
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


def _peaks(activation: _Activation, before: Inserter) -> ir.Value:
    value, shape = activation.value, activation.shape
    others = before.constant(np.array([a for a in range(len(shape)) if a != activation.axis], np.int64))
    channels = (shape[activation.axis],)

    def add(op: str, *inputs: ir.Value, **attributes: int) -> ir.Value:
        return before.add(op, inputs, channels, attributes, dtype=value.dtype)

    # Of both ends, as the magnitudes would be a second activation in memory.
    highest, lowest = (add(op, value, others, keepdims=0) for op in ("ReduceMax", "ReduceMin"))
    return _float32(add("Max", highest, add("Neg", lowest)), before)


def _sample(activation: _Activation, before: Inserter) -> ir.Value:
    value, size, stride = activation.value, math.prod(activation.shape), activation.stride
    line = before.reshape(value, (size,))
    start, end, axis, step = (before.constant(np.array([n], np.int64)) for n in (0, size, 0, stride))
    count = (math.ceil(size / stride),)
    return _float32(before.add("Slice", [line, start, end, axis, step], count, {}, dtype=value.dtype), before)


def _float32(value: ir.Value, before: Inserter) -> ir.Value:
    """In the type that all parts can be joined in."""
    return before.add("Cast", [value], shape_of(value), {"to": FLOAT32.dtype}, dtype=FLOAT32.dtype)
