"""The graphs of several buckets -> one graph with dynamic shapes, equal to each of them at that bucket's shapes.

An engine made of it has one optimization profile for each bucket, and all of them share one copy of the weights.

1. The graphs have the same nodes in the same order, and read the same weights.
2. A constant that differs is looked up by the number of the bucket; of a shape only the sizes that differ are, so that
   an engine sees which ones are fixed.
3. An Expand or a Slice that some graphs lack, because it does nothing there, does nothing there in the result either.
4. What differs in any other way is refused.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.errors import ExportError
from toolchain.graph.bucket_choice import BucketChoice
from toolchain.graph.placeholder import is_weight

Values = tuple[ir.Value, ...]
METADATA_KEY = "diffbuild.profiles"
HINT = "leave profile_per_bucket out of the recipe: each bucket then has an engine of its own"


def merge_buckets(models: Sequence[ir.Model]) -> ir.Model:
    """One graph for all the models, with the buckets' shapes in its metadata. Raises ExportError."""
    return _Merge(models).model()


def read_profiles(model: ir.Model) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of a graph's dynamic inputs, bucket by bucket; empty for a graph with static shapes."""
    text = model.metadata_props.get(METADATA_KEY, "[]")
    return [{name: tuple(shape) for name, shape in profile.items()} for profile in json.loads(text)]


class _Merge:
    """`_known` says which value of the result stands for which value of each graph."""

    def __init__(self, models: Sequence[ir.Model]) -> None:
        self._models = models
        self._graphs = [model.graph for model in models]
        self._known: dict[Values, ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._taken: set[ir.Node] = set()
        self._sizes: dict[tuple[int, ...], str] = {}
        inputs = self._columns([g.inputs for g in self._graphs], "inputs")
        self._inputs = [self._end(values, ir.Value(name=values[0].name)) for values in inputs]
        self._choice = BucketChoice(self._inputs, [[_shape(v) for v in g.inputs] for g in self._graphs])

    def model(self) -> ir.Model:
        rows = [deque(node for node in graph if node.op_type != "Constant") for graph in self._graphs]
        while any(rows):
            for row, took in zip(rows, self._row([row[0] if row else None for row in rows]), strict=True):
                if took:
                    row.popleft()
        outputs = []
        for values in self._columns([g.outputs for g in self._graphs], "outputs"):
            if values not in self._known:
                raise _differ(values, "the outputs")
            outputs.append(self._end(values, self._known[values]))
        first = self._models[0]
        graph = ir.Graph(
            self._inputs,
            outputs,
            nodes=[*self._choice.nodes, *self._nodes],
            initializers=[*self._weights.values(), *self._choice.constants],
            opset_imports=first.opset_imports,
            name=first.graph.name,
        )
        dynamic = [i for i, v in enumerate(self._inputs) if v.shape is not None and not v.shape.is_static()]
        shapes = [{str(g.inputs[i].name): _shape(g.inputs[i]) for i in dynamic} for g in self._graphs]
        return ir.Model(graph, ir_version=first.ir_version, metadata_props={METADATA_KEY: json.dumps(shapes)})

    def _end(self, values: Values, end: ir.Value) -> ir.Value:
        """What stands for an input or an output, with names for the sizes that differ: the same for the same sizes."""
        first = values[0]
        if len({(v.name, v.dtype, len(_shape(v))) for v in values}) > 1:
            raise _differ(values, "the ends of the graph")
        dims: list[int | str] = []
        for axis, size in enumerate(zip(*map(_shape, values), strict=True)):
            same = len(set(size)) == 1
            dims.append(size[0] if same else self._sizes.setdefault(size, f"{first.name}_{axis}"))
        end.name, end.shape, end.type = first.name, ir.Shape(dims), first.type
        self._known[values] = end
        return end

    def _columns(self, sides: Sequence[Sequence[ir.Value]], what: str) -> list[Values]:
        if len({len(side) for side in sides}) > 1:
            raise _differ([], what)
        return list(zip(*sides, strict=True))

    def _row(self, heads: Sequence[ir.Node | None]) -> list[bool]:
        """Merges the next node of every graph, or of those that have it, and says which graphs it was taken from."""
        nodes = [node for node in heads if node is not None]
        if len(nodes) == len(heads) and len({n.op_type for n in nodes}) == 1 and self._are_one(nodes):
            self._node(nodes)
        else:
            nodes = self._node_of_some(heads)
        self._taken.update(nodes)
        return [node in nodes for node in heads]

    def _are_one(self, nodes: Sequence[ir.Node]) -> bool:
        """Whether nodes that some graphs may lack are one node, and not different ones."""
        read = tuple(node.inputs[0] for node in nodes if node.inputs and node.inputs[0] is not None)
        return nodes[0].op_type not in STILL or read in self._known or not any(read[0] is key[0] for key in self._known)

    def _node(self, nodes: Sequence[ir.Node]) -> None:
        alike = {(n.domain, len(n.inputs), *(v.dtype for v in n.outputs), _attributes(n)) for n in nodes}
        if len(alike) > 1:
            raise _differ(nodes, "the nodes")
        inputs = [self._operand(values, nodes[0]) for values in zip(*(n.inputs for n in nodes), strict=True)]
        self._append(nodes[0], inputs, list(zip(*(n.outputs for n in nodes), strict=True)))

    def _node_of_some(self, heads: Sequence[ir.Node | None]) -> list[ir.Node]:
        """Merges a node that some graphs have next, and others not at all: there its input stands for its output."""
        there, nodes, source = self._some(heads)
        rest = [
            STILL[there.op_type](there, _shape(value)) if node is None else [_constant(v) for v in node.inputs[1:]]
            for node, value in zip(nodes, source, strict=True)
        ]
        if any(array is None for arrays in rest for array in arrays) or len({len(arrays) for arrays in rest}) > 1:
            raise _differ(nodes, "the inputs")
        chosen = [self._choice.of(arrays) for arrays in zip(*rest, strict=True)]
        outputs = tuple(v if node is None else node.outputs[0] for node, v in zip(nodes, source, strict=True))
        self._append(there, [self._known[source], *chosen], [outputs], f"_of_some_{len(self._nodes)}")
        return [node for node in nodes if node is not None]

    def _some(self, heads: Sequence[ir.Node | None]) -> tuple[ir.Node, list[ir.Node | None], Values]:
        """Such a node, all graphs' next nodes that are it, and what it reads in each of them."""
        for index, first in enumerate(heads):
            if first is None or first.op_type not in STILL:
                continue
            for source in (key for key in self._known if key[index] is first.inputs[0]):
                pairs = zip(heads, source, strict=True)
                nodes = [n if n is not None and _reads(n, first.op_type, v) else None for n, v in pairs]
                lacking = [v for n, v in zip(nodes, source, strict=True) if n is None]
                if not any(self._comes(first.op_type, value) for value in lacking):
                    return first, nodes, source
        raise _differ(heads, "the nodes")

    def _comes(self, kind: str, source: ir.Value) -> bool:
        """Whether a graph has such a node still to come."""
        return any(_reads(use.node, kind, source) and use.node not in self._taken for use in source.uses())

    def _append(
        self, like: ir.Node, inputs: Sequence[ir.Value | None], outputs: Sequence[Values], suffix: str = ""
    ) -> None:
        """`suffix` keeps names apart that come from another graph than the first."""
        results = [ir.Value(name=f"{v.name}{suffix}", type=v.type) for v in like.outputs]
        name, attributes = f"{like.name}{suffix}", list(like.attributes.values())
        self._nodes.append(ir.Node(like.domain, like.op_type, inputs, attributes, outputs=results, name=name))
        self._known |= zip(outputs, results, strict=True)

    def _operand(self, values: Sequence[ir.Value | None], reader: ir.Node) -> ir.Value | None:
        there = tuple(value for value in values if value is not None)
        if not there:
            return None
        if len(there) < len(values):
            raise _differ([reader], "the inputs")
        if there in self._known:
            return self._known[there]
        arrays = [array for array in map(_constant, there) if array is not None]
        return self._choice.of(arrays) if len(arrays) == len(there) else self._weight(there, reader)

    def _weight(self, values: Values, reader: ir.Node) -> ir.Value:
        first = values[0]
        if len({(v.name, v.dtype, _shape(v)) for v in values}) > 1 or not all(map(is_weight, values)):
            raise _differ([reader], "the inputs")
        weight = ir.Value(name=first.name, shape=first.shape, type=first.type, const_value=first.const_value)
        self._known[values] = self._weights[str(first.name)] = weight
        return weight


def _expand_nothing(node: ir.Node, shape: tuple[int, ...]) -> list[Any]:
    return [np.array(shape, np.int64)]


def _slice_nothing(node: ir.Node, shape: tuple[int, ...]) -> list[Any]:
    """Starts, ends, axes and steps of a Slice like `node` that takes all of a value."""
    axes = _constant(node.inputs[3]) if len(node.inputs) > 3 else np.arange(len(shape))
    if axes is None:
        return [None]
    ends = np.array([shape[axis] for axis in axes], np.int64)
    return [np.zeros_like(ends), ends, axes, np.ones_like(ends)][: len(node.inputs) - 1]


STILL = {"Expand": _expand_nothing, "Slice": _slice_nothing}
"""Nodes that a graph lacks where they do nothing -> the inputs with which they do nothing."""


def _reads(node: ir.Node, kind: str, source: ir.Value) -> bool:
    return node.op_type == kind and node.inputs[0] is source


def _shape(value: ir.Value) -> tuple[int, ...]:
    if value.shape is None or not value.shape.is_static():
        raise _differ([value], "a shape is not known, as the shapes")
    return tuple(value.shape.numpy())


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """What a graph holds for a value; None for one that is computed, given or loaded."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None and not is_weight(value) else None
    return None if tensor is None else tensor.numpy()


def _attributes(node: ir.Node) -> tuple[Any, ...]:
    """What can be compared and hashed of a node's attributes."""
    comparable: dict[str, Any] = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        tensor = isinstance(value, ir.TensorProtocol)
        comparable[name] = (value.dtype, tuple(value.shape), value.numpy().tobytes()) if tensor else repr(value)
    return (node.op_type, *sorted(comparable.items()))


def _differ(those: Sequence[ir.Node | ir.Value | None], what: str) -> ExportError:
    names = ("nothing" if it is None else f"{getattr(it, 'op_type', '')} {it.name}".strip() for it in those)
    got = " and ".join(dict.fromkeys(names)) or None
    return ExportError(f"the buckets cannot share an engine: {what} of their graphs differ", got=got, hint=HINT)
