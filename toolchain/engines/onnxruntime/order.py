"""The order of a graph's nodes, by which ONNX Runtime decides when each of them runs: see `activations.run_order`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import onnx_ir as ir


def gather_early(model: ir.Model) -> None:
    """Sorts the nodes so that what a last Concat gathers from all over a graph is computed as soon as it can be: a
    session would run it after all the rest, and keep in memory until then what it is made of.

    1. The last output is a Concat, and the graph has others: what the Concat alone needs stands behind the rest, its
       last part first, for a session goes back from the last node, and takes of its inputs the one first that stands
       last.
    2. Any other graph stays as it is.
    """
    graph = model.graph
    *others, last = graph.outputs
    gather = last.producer()
    if not others or gather is None or gather.op_type != "Concat" or last.uses():
        return
    nodes, known = [*graph], set(_needed(others, set()))
    rest = [node for node in nodes if node in known]
    parts = [[*_needed([part], known)] for part in gather.inputs if part is not None]
    graph.remove(nodes)
    graph.extend([*rest, *(node for part in reversed(parts) for node in part), gather])


def _needed(values: Iterable[ir.Value], known: set[ir.Node]) -> Iterator[ir.Node]:
    """The nodes that lead to values, each after those that it needs, but for `known` ones, which they become."""
    waiting = [value.producer() for value in values]
    while waiting:
        node = waiting.pop()
        if node is None or node in known:
            continue
        sources = [value.producer() for value in node.inputs if value is not None]
        missing = [source for source in sources if source is not None and source not in known]
        if missing:
            waiting += [node, *missing]
        else:
            known.add(node)
            yield node
