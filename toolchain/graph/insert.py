"""New nodes in a graph, in front of one that is there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray


class Inserter:
    """Puts new nodes before `where`; their values have `where`'s type."""

    def __init__(self, where: ir.Node) -> None:
        assert where.graph is not None
        self._graph, self._where = where.graph, where
        self._dtype = where.outputs[0].dtype or ir.DataType.FLOAT

    def add(
        self,
        op: str,
        inputs: Sequence[ir.Value | None],
        shape: Sequence[int],
        attributes: Mapping[str, Any],
        *,
        domain: str = "",
        dtype: ir.DataType | None = None,
    ) -> ir.Value:
        """A node's output. `dtype` is its type where it is not that of `where`."""
        node = ir.node(op, inputs, attributes, domain=domain)
        output = node.outputs[0]
        output.shape, output.type = ir.Shape(shape), ir.TensorType(dtype or self._dtype)
        self._graph.insert_before(self._where, node)
        return output

    def reshape(self, value: ir.Value, shape: tuple[int, ...]) -> ir.Value:
        """The same elements in another shape, in the type that they have."""
        return self.add("Reshape", [value, self.constant(np.array(shape, np.int64))], shape, {}, dtype=value.dtype)

    def constant(self, array: NDArray[Any]) -> ir.Value:
        """The output of a Constant."""
        tensor = ir.tensor(array)
        return self.add("Constant", [], array.shape, {"value": tensor}, dtype=tensor.dtype)


def replace_value(old: ir.Value, new: ir.Value) -> None:
    """Lets `new` be read wherever `old` is, under its name where the graph's output is."""
    if old.is_graph_output():
        old.name, new.name = None, old.name
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def shape_of(value: ir.Value) -> tuple[int, ...]:
    """Static, or () where it is not known."""
    dims = tuple(value.shape) if value.shape is not None else ()
    return tuple(d for d in dims if isinstance(d, int)) if all(isinstance(d, int) for d in dims) else ()


def shared_constant(graph: ir.Graph, name: str, array: NDArray[Any]) -> ir.Value:
    """An initializer, which is there once."""
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        kind = ir.TensorType(tensor.dtype)
        graph.register_initializer(ir.Value(name=name, shape=ir.Shape(array.shape), type=kind, const_value=tensor))
    return graph.initializers[name]
