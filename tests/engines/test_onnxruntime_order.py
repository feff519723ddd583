"""The numbered cases of `gather_early`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.test_simplify import model, value, weight
from toolchain.engines.onnxruntime.activations import memory_facts, run_order
from toolchain.engines.onnxruntime.order import gather_early
from toolchain.engines.onnxruntime.session import CPU_PROVIDER, open_session, session_options
from toolchain.precision.watch import watch, watched

SIDE = 64
LAYERS = 12


def chain(layers: int = LAYERS) -> ir.Model:
    """Products one after the other, with more rows than columns, so that activations are larger than weights."""
    x = value("x", (512, SIDE))
    weights = [weight(f"{i}.weight", (SIDE, SIDE)) for i in range(layers)]
    nodes: list[ir.Node] = []
    for i, w in enumerate(weights):
        before = nodes[-1].outputs[0] if nodes else x
        nodes.append(ir.node("MatMul", [before, w], outputs=[value(f"{i}.y", (512, SIDE))], name=f"{i}"))
    return model(nodes, [x], [nodes[-1].outputs[0]], weights)


def named(graph: ir.Model) -> ir.Model:
    for number, node in enumerate(graph.graph):
        node.name = node.name or f"{node.op_type}.{number}"
    return graph


def test_1_parts_are_computed_when_what_they_need_is_there() -> None:
    graph = named(watch(chain()))
    plain = memory_facts(named(chain()), frozenset())["activation_bytes"]
    kept = 4 * sum(w.channels + w.samples for w in watched(chain()))
    late = memory_facts(graph, frozenset())["activation_bytes"]
    assert late >= LAYERS / 3 * plain  # all activations at once
    gather_early(graph)
    assert memory_facts(graph, frozenset())["activation_bytes"] <= plain + 2 * kept
    kinds = [node.op_type for node in run_order(graph.graph) if node.op_type in ("MatMul", "ReduceMax", "Slice")]
    assert [*zip(kinds[::3], kinds[1::3], kinds[2::3], strict=True)] == [("ReduceMax", "Slice", "MatMul")] * LAYERS


def test_1_onnxruntime_runs_it_so_and_computes_the_same(tmp_path: Path) -> None:
    import onnxruntime

    graph = named(watch(chain()))
    for name, initializer in graph.graph.initializers.items():
        random = np.random.default_rng(len(str(name))).standard_normal((SIDE, SIDE)).astype(np.float32) / 8
        initializer.const_value = ir.tensor(random, name=name)
    x = np.random.default_rng(0).standard_normal((512, SIDE)).astype(np.float32)
    results = []
    for number in range(2):
        settings = session_options(1, {})
        settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        settings.enable_profiling, settings.profile_file_prefix = True, str(tmp_path / str(number))
        session = open_session(ir.to_proto(graph).SerializeToString(), settings, tmp_path, (CPU_PROVIDER,))
        results.append(session.run(None, {"x": x}))
        events = json.loads(Path(session.end_profiling()).read_text())
        ran = [e["name"].removesuffix("_kernel_time") for e in events if e.get("cat") == "Node"]
        constant = {node.name for node in graph.graph if node.op_type == "Constant"}
        assert [n.name for n in run_order(graph.graph) if n.name not in constant] == ran
        gather_early(graph)
    for late, early in zip(*results, strict=True):
        np.testing.assert_array_equal(late, early)


def test_1_twice_is_once() -> None:
    graph = named(watch(chain()))
    gather_early(graph)
    once = [node.name for node in graph.graph]
    gather_early(graph)
    assert [node.name for node in graph.graph] == once


@pytest.mark.parametrize("case", ["one output", "no Concat", "read again"])
def test_2_other_graphs_stay(case: str) -> None:
    graph = named(watch(chain()))
    gather = graph.graph.outputs[-1]
    if case == "one output":
        del graph.graph.outputs[0]
    elif case == "no Concat":
        graph.graph.append(ir.node("Neg", [gather], outputs=[value("negative", (3,))]))
        graph.graph.outputs[-1] = list(graph.graph)[-1].outputs[0]
    else:
        graph.graph.append(ir.node("Neg", [gather], outputs=[value("negative", (3,))]))
    before = [node.name for node in graph.graph]
    gather_early(graph)
    assert [node.name for node in graph.graph] == before
