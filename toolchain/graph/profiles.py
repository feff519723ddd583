"""The graphs of several buckets -> one graph with dynamic shapes, which is each of them at that bucket's shapes.

An engine made of it has one optimization profile for each bucket, and all of them share one copy of the weights.

1. The graphs have the same nodes in the same order, and read the same weights.
2. A constant that differs is looked up by the number of the bucket; of a shape only the sizes that differ are, so that
   an engine sees which ones are fixed.
3. An Expand or a Slice that some graphs lack, because it does nothing there, does nothing there in the result either.
4. What differs in any other way is refused.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.errors import ExportError
from toolchain.graph.bucket_choice import BucketChoice
from toolchain.graph.placeholder import is_weight

Values = tuple[ir.Value, ...]
PROFILES = "diffbuild.profiles"
HINT = "leave profile_per_bucket out of the recipe: each bucket then has an engine of its own"


def merge_buckets(models: Sequence[ir.Model]) -> ir.Model:
    """One graph for all the models, with the buckets' shapes in its metadata. Raises ExportError."""
    return _Merge(models).model()


def read_profiles(model: ir.Model) -> list[dict[str, tuple[int, ...]]]:
    """The shapes of a graph's dynamic inputs, bucket by bucket; empty for a graph with static shapes."""
    text = model.metadata_props.get(PROFILES, "[]")
    return [{name: tuple(shape) for name, shape in profile.items()} for profile in json.loads(text)]


class _Merge:
    """`_known` says which value of the result stands for which value of each graph."""

    def __init__(self, models: Sequence[ir.Model]) -> None:
        self._models = models
        self._graphs = [model.graph for model in models]
        self._known: dict[Values, ir.Value] = {}
        self._weights: dict[str, ir.Value] = {}
        self._nodes: list[ir.Node] = []
        self._inputs = [self._end(values) for values in self._columns([g.inputs for g in self._graphs], "inputs")]
        self._choice = BucketChoice(self._inputs, [[_shape(v) for v in g.inputs] for g in self._graphs])

    def model(self) -> ir.Model:
        rows = [[node for node in graph if node.op_type != "Constant"] for graph in self._graphs]
        while any(rows):
            taken = self._row([row[0] if row else None for row in rows])
            rows = [row[1:] if took else row for row, took in zip(rows, taken, strict=True)]
        outputs = [self._end(values) for values in self._columns([g.outputs for g in self._graphs], "outputs")]
        first = self._models[0]
        graph = ir.Graph(
            self._inputs,
            outputs,
            nodes=[*self._choice.nodes, *self._nodes],
            initializers=[*self._weights.values(), *self._choice.constants],
            opset_imports=first.opset_imports,
            name=first.graph.name,
        )
        dynamic = [i for i, value in enumerate(self._inputs) if not _of(value.shape).is_static()]
        shapes = [{str(g.inputs[i].name): _shape(g.inputs[i]) for i in dynamic} for g in self._graphs]
        return ir.Model(graph, ir_version=first.ir_version, metadata_props={PROFILES: json.dumps(shapes)})

    def _end(self, values: Values) -> ir.Value:
        """An input, or an output that some node has made, with names for the sizes that differ."""
        first = values[0]
        if len({(v.name, v.dtype, len(_shape(v))) for v in values}) > 1:
            raise _differ(values, "the ends of the graph")
        sizes = zip(*map(_shape, values), strict=True)
        dims = [size[0] if len(set(size)) == 1 else f"{first.name}_{axis}" for axis, size in enumerate(sizes)]
        made = self._known.get(values) or ir.Value(name=first.name)
        made.name, made.shape, made.type = first.name, ir.Shape(dims), first.type
        self._known[values] = made
        return made

    def _columns(self, sides: Sequence[Sequence[ir.Value]], what: str) -> list[Values]:
        if len({len(side) for side in sides}) > 1:
            raise _differ([], what)
        return list(zip(*sides, strict=True))

    def _row(self, heads: Sequence[ir.Node | None]) -> list[bool]:
        """Merges the next node of every graph, or of those that have it, and says which graphs it was taken from."""
        kinds = {node.op_type if node is not None else "" for node in heads}
        optional = sorted(kinds & STILL.keys())
        if len(kinds) == 1:
            self._node([node for node in heads if node is not None])
        elif optional:
            heads = [node if node is not None and node.op_type == optional[0] else None for node in heads]
            self._node_of_some(heads)
        else:
            raise _differ(heads, "the nodes")
        return [node is not None for node in heads]

    def _node(self, nodes: Sequence[ir.Node]) -> None:
        if len({(n.domain, len(n.inputs), len(n.outputs), _attributes(n)) for n in nodes}) > 1:
            raise _differ(nodes, "the nodes")
        inputs = [self._operand(values, nodes[0]) for values in zip(*(n.inputs for n in nodes), strict=True)]
        self._append(nodes[0], inputs, list(zip(*(n.outputs for n in nodes), strict=True)))

    def _node_of_some(self, nodes: Sequence[ir.Node | None]) -> None:
        """A node that some graphs have; in the others its input stands for its output."""
        there = next(node for node in nodes if node is not None)
        read = [None if node is None else node.inputs[0] for node in nodes]
        source = next((k for k in self._known if all(v in (None, w) for v, w in zip(read, k, strict=True))), None)
        if source is None:
            raise _differ(nodes, "the nodes")
        still = STILL[there.op_type]
        rest = [
            still(there, _shape(value)) if node is None else [_constant(v) for v in node.inputs[1:]]
            for node, value in zip(nodes, source, strict=True)
        ]
        if any(array is None for arrays in rest for array in arrays) or len({len(arrays) for arrays in rest}) > 1:
            raise _differ(nodes, "the inputs")
        chosen = [self._choice.of(arrays) for arrays in zip(*rest, strict=True)]
        outputs = tuple(v if node is None else node.outputs[0] for node, v in zip(nodes, source, strict=True))
        self._append(there, [self._known[source], *chosen], [outputs], "_of_some")

    def _append(
        self, like: ir.Node, inputs: Sequence[ir.Value | None], outputs: Sequence[Values], suffix: str = ""
    ) -> None:
        """`suffix` keeps names apart that come from another graph than the first."""
        made = [ir.Value(name=f"{v.name}{suffix}", type=v.type) for v in like.outputs]
        name, attributes = f"{like.name}{suffix}", list(like.attributes.values())
        self._nodes.append(ir.Node(like.domain, like.op_type, inputs, attributes, outputs=made, name=name))
        self._known |= zip(outputs, made, strict=True)

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
        made = ir.Value(name=first.name, shape=first.shape, type=first.type, const_value=first.const_value)
        self._known[values] = self._weights[str(first.name)] = made
        return made


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


def _of(shape: ir.Shape | None) -> ir.Shape:
    assert shape is not None, "a bucket's graph knows its shapes"
    return shape


def _shape(value: ir.Value) -> tuple[int, ...]:
    return tuple(_of(value.shape).numpy())


def _constant(value: ir.Value | None) -> NDArray[Any] | None:
    """What a graph holds for a value; None for one that is computed, given or loaded."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None and not is_weight(value) else None
    return None if tensor is None else tensor.numpy()


def _attributes(node: ir.Node) -> tuple[Any, ...]:
    """What can be compared and hashed of a node's attributes."""
    texts = {}
    for name, attribute in node.attributes.items():
        value = attribute.value
        texts[name] = value.numpy().tobytes() if isinstance(value, ir.TensorProtocol) else repr(value)
    return (node.op_type, *sorted(texts.items()))


def _differ(those: Sequence[ir.Node | ir.Value | None], what: str) -> ExportError:
    names = ("nothing" if it is None else f"{getattr(it, 'op_type', '')} {it.name}".strip() for it in those)
    got = " and ".join(dict.fromkeys(names)) or None
    return ExportError(f"the buckets cannot share an engine: {what} of their graphs differ", got=got, hint=HINT)
