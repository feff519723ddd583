"""What is written down of an engine's memory: counted by hand, and held against ONNX Runtime's own profile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import toolchain
from tests.build_graph import write_network
from tests.graph.test_simplify import constant, model, value, weight
from toolchain.engines.buffers import HostMemory
from toolchain.engines.cpu import cpu_features
from toolchain.engines.onnxruntime.activations import BLOCK, NARROW_BLOCK, NODE_BYTES, _Kinds, memory_facts, run_order
from toolchain.engines.onnxruntime.build import OnnxRuntimeBuilder
from toolchain.engines.onnxruntime.optimize import widen_late
from toolchain.engines.onnxruntime.run import OnnxRuntimeRunner
from toolchain.engines.onnxruntime_cuda import build as cuda_build
from toolchain.graph.placeholder import placeholder
from toolchain.recipe.options import OnnxRuntimeCudaOptions, OnnxRuntimeOptions
from toolchain.runtime.engines import BoundEngine

AVX512 = "x86_64-avx512"
Shape = tuple[int, ...]


def unknown(name: str) -> ir.Value:
    """A tensor as ONNX Runtime's optimiser leaves it: without a shape."""
    return ir.Value(name=name)


def of(op: str, inputs: list[ir.Value], *, features: str = AVX512, **attributes: Any) -> dict[str, Any]:
    """The facts of a graph that makes one tensor of an unknown shape from `inputs`, the first of which is its input."""
    made, y = unknown("made"), value("y", (1,))
    nodes = [ir.node(op, inputs, attributes, outputs=[made]), ir.node("ReduceMax", [made], outputs=[y])]
    return memory_facts(model(nodes, inputs[:1], [y], inputs[1:]), features)


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "elements"),
    [
        ("ReorderInput", [(2, 4, 8, 8)], {}, 2 * BLOCK * 8 * 8),
        ("ReorderInput", [(2, 32, 8, 8)], {}, 2 * 32 * 8 * 8),
        ("ReorderInput", [(2, 8, 9, 20)], {"channels_last": 1}, 2 * 2 * BLOCK * 8 * 9),
        ("Conv", [(1, 16, 8, 8), (32, 16, 3, 3)], {"pads": [1, 1, 1, 1]}, 32 * 8 * 8),
        ("Conv", [(1, 16, 8, 9), (32, 16, 3, 3)], {"strides": [2, 2], "pads": [0, 0, 1, 1]}, 32 * 4 * 4),
        ("Conv", [(1, 16, 9, 9), (32, 16, 3, 3)], {"dilations": [2, 2]}, 32 * 5 * 5),
        ("Conv", [(3, 4, 10), (8, 4, 3)], {}, 3 * 8 * 8),
        ("Upsample", [(1, 16, 4, 5)], {"scales": [1, 1, 2, 3]}, 16 * 8 * 15),
        ("Gemm", [(3, 5), (5, 7)], {}, 3 * 7),
        ("Gemm", [(5, 3), (7, 5)], {"transA": 1, "transB": 1}, 3 * 7),
        ("Pow", [(2, 3, 4), ()], {}, 2 * 3 * 4),
        ("Mul", [(3, 1), (2, 1, 4)], {}, 2 * 3 * 4),
        ("Concat", [(2, 3, 4), (2, 5, 4)], {"axis": 1}, 2 * 8 * 4),
        ("Concat", [(2, 3, 4), (2, 3, 1)], {"axis": -1}, 2 * 3 * 5),
        ("MatMul", [(2, 1, 3, 5), (4, 5, 7)], {}, 2 * 4 * 3 * 7),
        ("FusedMatMul", [(2, 5, 3), (2, 7, 5)], {"transA": 1, "transB": 1}, 2 * 3 * 7),
        ("Gather", [(2, 3, 4), (5, 6)], {"axis": 1}, 2 * 5 * 6 * 4),
        ("MultiHeadAttention", [(2, 6, 8), (2, 5, 8), (2, 5, 12)], {"num_heads": 2}, 2 * 6 * 12),
        ("MultiHeadAttention", [(2, 6, 8), (2, 4, 5, 2), (2, 4, 5, 3)], {"num_heads": 4}, 2 * 6 * 12),
        ("ReorderOutput", [(2, 16, 8, 9)], {"channels": 12}, 2 * 12 * 8 * 9),
        ("ReduceSum", [(2, 3, 4)], {"axes": [-1]}, 2 * 3),
        ("LayerNormalization", [(2, 3, 4), (4,)], {}, 2 * 3 * 4),
    ],
)
def test_shapes_that_the_optimiser_left_out(
    op: str, shapes: list[Shape], attributes: dict[str, Any], elements: int
) -> None:
    first, *others = shapes
    inputs = [value("x", first), *(weight(f"w{i}", shape) for i, shape in enumerate(others))]
    assert of(op, inputs, **attributes)["activation_bytes"] == 4 * elements


def test_a_cast_changes_the_size_of_its_tensor() -> None:
    assert of("Cast", [value("x", (2, 3))], to=ir.DataType.FLOAT16)["activation_bytes"] == 2 * 2 * 3


def test_channels_are_blocked_by_what_a_vector_holds() -> None:
    x = value("x", (1, 4, 8, 8))
    assert of("ReorderInput", [x], features="x86_64-avx2")["activation_bytes"] == 4 * NARROW_BLOCK * 8 * 8


@pytest.mark.parametrize("target", [[0, -1, 6], [2, 10, 6], [-1, 5, 0]])
def test_a_reshape_fills_in_what_is_left_open(target: list[int]) -> None:
    """A view is no tensor of its own: what is made from it is."""
    x, shape, y = value("x", (2, 5, 12)), constant("shape", np.int64(target)), value("y", (1,))
    view, made = unknown("view"), unknown("made")
    if target[-1] == 0:
        x = value("x", (4, 5, 6))
    nodes = [
        ir.node("Reshape", [x, shape], outputs=[view]),
        ir.node("Concat", [view, view], {"axis": 0}, outputs=[made]),
        ir.node("ReduceMax", [made], outputs=[y]),
    ]
    assert memory_facts(model(nodes, [x], [y], [shape]), AVX512)["activation_bytes"] == 4 * 2 * 120


@pytest.mark.parametrize(("axes", "keep", "elements"), [([-1], 1, 2 * 3), ([0, 1], 1, 4), ([1], 0, 2 * 4)])
def test_a_mean_is_as_large_as_what_it_leaves(axes: list[int], keep: int, elements: int) -> None:
    """Twice, beside itself, so that its shape counts as well as its size."""
    x, over, y = value("x", (2, 3, 4)), constant("axes", np.int64(axes)), value("y", (1,))
    mean, made = unknown("mean"), unknown("made")
    nodes = [
        ir.node("ReduceMean", [x, over], {"keepdims": keep}, outputs=[mean]),
        ir.node("Concat", [mean, mean], {"axis": 1}, outputs=[made]),
        ir.node("ReduceMax", [made], outputs=[y]),
    ]
    assert memory_facts(model(nodes, [x], [y], [over]), AVX512)["activation_bytes"] == 4 * elements * 3


def test_an_operator_without_a_rule_leaves_the_activations_open() -> None:
    found = of("FastGelu", [value("x", (2, 3))])
    assert (found["activation_bytes"], found["arena_bytes"]) == (None, None)


def test_weights_are_mapped_or_packed_or_a_table() -> None:
    """Rows of packed columns are filled up to 16; what is only looked up in is not read as a whole."""
    x, ids, y = value("x", (2, 3)), value("ids", (4,)), value("y", (2, 20))
    packed, turned, added, table, both = (
        weight(name, shape)
        for name, shape in (("p", (3, 20)), ("t", (17, 3)), ("a", (2, 20)), ("table", (50, 8)), ("both", (50, 8)))
    )
    product, looked, again, gemm = (
        value(n, s) for n, s in zip("klmn", [(2, 20), (4, 8), (4, 8), (2, 17)], strict=True)
    )
    total = value("o", (50, 8))
    nodes = [
        ir.node("MatMul", [x, packed], outputs=[product]),
        ir.node("Add", [product, added], outputs=[y]),
        ir.node("Gather", [table, ids], outputs=[looked]),
        ir.node("Gather", [both, ids], outputs=[again]),
        ir.node("Neg", [both], outputs=[total]),
        ir.node("Gemm", [x, turned], {"transB": 1}, outputs=[gemm]),
    ]
    outputs = [y, looked, again, total, gemm]
    found = memory_facts(model(nodes, [x, ids], outputs, [packed, turned, added, table, both]), AVX512)
    assert found["packed_bytes"] == 4 * (3 * 32 + 3 * 32)
    assert found["mapped_bytes"] == 4 * (2 * 20 + 50 * 8)
    assert found["session_bytes"] == 6 * NODE_BYTES


def test_a_batch_of_matrices_and_other_dtypes_are_not_packed() -> None:
    x, stack = value("x", (2, 2, 3)), weight("w", (2, 3, 5))
    assert of("MatMul", [x, stack])["packed_bytes"] == 0
    half = ir.Value(name="h", shape=ir.Shape((3, 5)), type=ir.TensorType(ir.DataType.FLOAT16))
    half.const_value = ir.tensor(np.zeros((3, 5), np.float16), name="h")
    assert of("MatMul", [value("x", (2, 3)), half])["packed_bytes"] == 0


@pytest.mark.parametrize("turned", [False, True])
def test_weights_are_widened_when_they_are_needed(turned: bool) -> None:
    """One at a time, and not all before the first product."""
    x, nodes, weights = value("x", (8, 64)), list[ir.Node](), list[ir.Value]()
    before = x
    for name in "abcd":
        stored = ir.Value(name=name, shape=ir.Shape((64, 64)), type=ir.TensorType(ir.DataType.INT8))
        stored.const_value = placeholder(name, ir.DataType.INT8, (64, 64))
        weights += [stored, weight(f"{name}.scales", (64,))]
        wide = value(f"{name}.wide", (64, 64))
        nodes.append(ir.node("DequantizeLinear", weights[-2:], {"axis": 1}, outputs=[wide], name=f"{name}.wide"))
        if turned:
            wide, source = value(f"{name}.turned", (64, 64)), wide
            nodes.append(ir.node("Transpose", [source], {"perm": [1, 0]}, outputs=[wide], name=f"{name}.turned"))
        nodes.append(ir.node("MatMul", [before, wide], outputs=[value(f"{name}.y", (8, 64))], name=name))
        before = nodes[-1].outputs[0]
    graph = model(nodes, [x], [before], weights)
    assert [node.name for node in run_order(graph.graph)] != [node.name for node in nodes]
    widen_late(graph.graph)
    assert [node.name for node in run_order(graph.graph)] == [node.name for node in nodes]
    wide_bytes, rows = 4 * 64 * 64, 4 * 8 * 64
    assert memory_facts(graph, AVX512)["activation_bytes"] <= (1 + turned) * wide_bytes + 2 * rows


def test_a_graph_of_constants_stays_one() -> None:
    made = model([ir.node("Neg", [weight("w", (2,))], outputs=[value("y", (2,))])], [], [value("y", (2,))], [])
    widen_late(made.graph)
    assert [node.op_type for node in made.graph] == ["Neg"]


def test_a_backend_that_cannot_tell_writes_nothing_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """How CUDA's kernels and their arena use memory is not known. Here its builder optimises for the CPU."""
    monkeypatch.setattr(cuda_build, "PROVIDER", "CPUExecutionProvider")
    monkeypatch.setattr(cuda_build, "load_libraries", lambda: None)
    write_network(tmp_path, "float32")
    weights = {"weights": tmp_path / "weights.safetensors"}
    for number in range(2):
        (tmp_path / str(number)).mkdir()
    OnnxRuntimeBuilder().build(tmp_path / "graph.onnx", weights, tmp_path / "0", OnnxRuntimeOptions("extended", 1))
    cuda = cuda_build.OnnxRuntimeCudaBuilder()
    cuda.build(tmp_path / "graph.onnx", weights, tmp_path / "1", OnnxRuntimeCudaOptions("extended"))
    assert [(tmp_path / str(n) / "graph.onnx").exists() for n in range(2)] == [True, True]
    assert [(tmp_path / str(n) / "engine.json").exists() for n in range(2)] == [True, False]


def require_what_onnxruntime_does(bundle: toolchain.Bundle, component: str, scratch: Path) -> None:
    """Order and shapes equal those that ONNX Runtime reports, and the peak is near the one of its arena."""
    entry = bundle.engine(component, bundle.buckets[-1])
    weights = {role: bundle.path / name for role, name in entry.weights.items()}
    folder, profile = bundle.path / entry.folder, str(scratch / "profile")
    options = OnnxRuntimeOptions(threads=1)
    engine = OnnxRuntimeRunner().open(folder, weights, entry.spec, options, HostMemory(), profile=profile)
    BoundEngine(engine, HostMemory())({})
    nodes = [e for e in json.loads(engine.end_profile().read_text()) if e.get("cat") == "Node"]

    graph = ir.load(bundle.path / entry.folder / "graph.onnx").graph
    kinds, by_name = _Kinds(BLOCK if "avx512" in cpu_features() else NARROW_BLOCK), {n.name: n for n in graph}
    assert [n.name for n in run_order(graph)] == [e["name"].removesuffix("_kernel_time") for e in nodes]
    for event in nodes:
        made = by_name[event["name"].removesuffix("_kernel_time")].outputs
        reported = [tuple(shape) for entry in event["args"]["output_type_shape"] for shape in entry.values()]
        assert [kinds(v)[0] for v in made if v.name] == reported, event["name"]

    facts = json.loads((bundle.path / entry.folder / "engine.json").read_text())
    used = [int(e["args"]["mem_bytes_requested_in_use"]) for e in nodes]
    assert max(used) - facts["packed_bytes"] == pytest.approx(facts["activation_bytes"], rel=0.1)


@pytest.mark.parametrize("component", ["text_encoder", "denoiser", "vae_decoder", "vae_encoder"])
def test_it_is_what_onnxruntime_does(tiny_bundle: Path, tmp_path: Path, component: str) -> None:
    require_what_onnxruntime_does(toolchain.read_bundle(tiny_bundle), component, tmp_path)


def test_a_product_in_int8_packs_columns_and_their_sums() -> None:
    """Columns are filled up to 16 and rows to 4, and each column has a sum of four bytes."""
    x, scales, step = value("x", (2, 3), ir.DataType.UINT8), value("scales", (20,)), value("step", ())
    packed = value("w", (3, 20), ir.DataType.INT8)
    packed.const_value = ir.tensor(np.zeros((3, 20), np.int8), name="w")
    found = of("MatMulIntegerToFloat", [x, packed, step, scales])
    assert (found["packed_bytes"], found["activation_bytes"]) == (32 * (4 + 4), 4 * 2 * 20)


def test_rounding_to_eight_bits_takes_a_byte() -> None:
    zero = constant("zero", np.uint8(128))
    assert of("QuantizeLinear", [value("x", (2, 3)), value("step", ()), zero])["activation_bytes"] == 2 * 3
