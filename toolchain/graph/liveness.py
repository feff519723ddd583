"""Liveness analysis: peak bytes of the tensors between the nodes of a graph, when the nodes run in a given order.

Buffers are reused as an engine's planner does, ONNX Runtime's above all (allocation_planner.cc):

1. Inputs, outputs and weights are the caller's and are not counted, nor is a view (Reshape and its kin) of anything.
2. A buffer lives from the node that fills it to the last node that reads what is in it.
3. The result of some operators takes the place of an input of its shape that nothing else reads any more.
4. Any other result reuses a dead buffer of its shape, which thereby lives on; buffers of another shape are not reused.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

Kind = tuple[tuple[int, ...], ir.DataType]
"""Shape and dtype of a tensor."""
VIEWS = frozenset({"Reshape", "Squeeze", "Unsqueeze", "Flatten", "Identity"})
IN_PLACE = {
    ("", "Add"): (0, 1),
    ("", "Sub"): (0, 1),
    ("", "Mul"): (0, 1),
    ("", "Div"): (0, 1),
    ("", "Sigmoid"): (0,),
    ("", "Sqrt"): (0,),
    ("", "Clip"): (0,),
    ("com.microsoft.nchwc", "Conv"): (3,),  # what is added to the sum
}
"""The inputs whose place a result may take, as ONNX Runtime's kernels for the CPU have it."""


def facts(model: ir.Model) -> dict[str, Any]:
    """Facts of an exported graph: bytes of its weights and, where all shapes are known, of its activations at peak."""
    weights = [v.const_value.nbytes for v in model.graph.initializers.values() if v.const_value is not None]
    try:
        activations: int | None = peak_bytes(list(model.graph), declared)
    except LookupError:
        activations = None
    return {"weight_bytes": sum(weights), "activation_bytes": activations}


def declared(value: ir.Value) -> Kind:
    """As it is written in the graph. LookupError where it is not."""
    tensor = value.const_value
    shape, dtype = (value.shape, value.dtype) if tensor is None else (tensor.shape, tensor.dtype)
    if not isinstance(shape, ir.Shape) or not shape.is_static() or dtype is None:
        raise LookupError(f"no shape of {value.name}")
    return shape.numpy(), dtype


@dataclass(eq=False)
class _Buffer:
    """`reads` are those still to come; `first` and `last` number the nodes between which it lives."""

    kind: Kind
    first: int
    last: int = -1
    reads: int = 0

    @property
    def nbytes(self) -> int:
        shape, dtype = self.kind
        return math.ceil(math.prod(shape) * dtype.itemsize)


def peak_bytes(nodes: Sequence[ir.Node], kind_of: Callable[[ir.Value], Kind]) -> int:
    """Peak bytes of the tensors that live between these nodes. Raises what `kind_of` raises."""
    births: Counter[int] = Counter()
    deaths: Counter[int] = Counter()
    for buffer in _buffers(nodes, kind_of):
        births[buffer.first] += buffer.nbytes
        deaths[buffer.last + 1] += buffer.nbytes
    lived = (births[index] - deaths[index] for index in range(len(nodes)))
    return max(itertools.accumulate(lived), default=0)


def _buffers(nodes: Sequence[ir.Node], kind_of: Callable[[ir.Value], Kind]) -> list[_Buffer]:
    """Every buffer that the nodes need. A value that is missing in `buffer_of` is the caller's."""
    buffer_of: dict[ir.Value, _Buffer] = {}
    buffers: list[_Buffer] = []
    free: list[_Buffer] = []  # the one freed last comes first, as its memory is still in a cache
    for index, node in enumerate(nodes):
        inputs = [buffer_of.get(value) if value is not None else None for value in node.inputs]
        for value in node.outputs:
            if value.is_graph_output():
                continue
            if node.op_type in VIEWS:
                buffer = inputs[0]
            else:
                kind = kind_of(value)
                buffer = _reused(node, inputs, kind, free)
                if buffer is None:
                    buffer = _Buffer(kind, index)
                    buffers.append(buffer)
            if buffer is not None:
                buffer_of[value] = buffer
                buffer.reads += len(value.uses())
                if not value.uses():
                    _release(buffer, index, free)
        for buffer in inputs:
            if buffer is not None:
                buffer.reads -= 1
                _release(buffer, index, free)
    return buffers


def _reused(node: ir.Node, inputs: list[_Buffer | None], kind: Kind, free: list[_Buffer]) -> _Buffer | None:
    for position in IN_PLACE.get((node.domain, node.op_type), ()):
        buffer = inputs[position] if position < len(inputs) else None
        if buffer is not None and buffer.reads == 1 and buffer.kind == kind:
            return buffer
    dead = next((buffer for buffer in free if buffer.kind == kind), None)
    if dead is not None:
        free.remove(dead)
    return dead


def _release(buffer: _Buffer, index: int, free: list[_Buffer]) -> None:
    if buffer.reads == 0 and buffer not in free:
        buffer.last = index
        free.insert(0, buffer)
