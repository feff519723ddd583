"""The OpenVINO backend: its numbers are torch's, what is executed in which type, what its files hold and lack."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest
import torch

import toolchain
from tests.graph.test_simplify import constant, model, value
from tests.openvino_here import BFLOAT16, copied_weights, has_bfloat16, need_bfloat16
from tests.tiny import RECIPE, recipe_for
from toolchain.engines.buffers import HostMemory
from toolchain.engines.cpu import physical_cores
from toolchain.engines.layers import Layer
from toolchain.engines.openvino import build as openvino_build
from toolchain.engines.openvino.build import OpenVinoBuilder, executed_layers
from toolchain.engines.openvino.compiled import settings
from toolchain.engines.openvino.memory import KERNEL_BYTES
from toolchain.engines.openvino.run import OpenVinoRunner
from toolchain.errors import EngineError
from toolchain.export.capture import capture
from toolchain.graph.placeholder import placeholder
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.recipe import Bucket
from toolchain.recipe.options import OpenVinoOptions
from toolchain.runtime.engines import open_engine
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.mapped import read_header
from toolchain.weights.safetensors import read_folder, write_safetensors

BUCKET = Bucket(1, 64, 64)
VAE = MODELS["sd"].component("vae_decoder")
BUILDER, RUNNER = OpenVinoBuilder(), OpenVinoRunner()
ONE_THREAD = OpenVinoOptions(threads=1)


class Prepared(NamedTuple):
    """A decoder's graph, its weight file and its engine; what it reads, and what torch gives in float32."""

    dtype: str
    graph: Path
    weights: dict[str, Path]
    engine: Path
    spec: GraphSpec
    latents: Any
    pixels: Any
    image: Any


@pytest.fixture(scope="module", params=["float32", BFLOAT16])
def prepared(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepared:
    folder = tmp_path_factory.mktemp(request.param)
    source = resolve_model(str(tiny_model))
    graph = BUILDER.prepare(capture(VAE, source, recipe_for("vae_decoder", dtype=request.param), BUCKET))
    ir.save(graph, folder / "graph.onnx")
    uses, weights = weight_uses(graph), {"weights": folder / "weights.safetensors"}
    write_weights(uses, find_tensors(uses, read_folder(tiny_model / "vae"), folder), weights["weights"])
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        pixels, image = VAE.reference(source, recipe_for())(torch.from_numpy(latents))
    (folder / "engine").mkdir()
    BUILDER.build(folder / "graph.onnx", weights, folder / "engine", OpenVinoOptions())
    spec = VAE.spec(source, BUCKET, recipe_for())
    return Prepared(
        request.param, folder / "graph.onnx", weights, folder / "engine", spec, latents, pixels.numpy(), image.numpy()
    )


def opened(prepared: Prepared, options: OpenVinoOptions = ONE_THREAD, spec: GraphSpec | None = None) -> Any:
    return RUNNER.open(prepared.engine, prepared.weights, spec or prepared.spec, options, HostMemory())


def test_numbers_are_those_of_torch(prepared: Prepared) -> None:
    engine = opened(prepared)
    drawn = {t.name: np.zeros(t.shape, t.dtype) for t in prepared.spec.outputs}
    engine.bind({"latents": prepared.latents, **drawn})()
    short = prepared.dtype == "bfloat16"
    # Of values from -0.6 to 0.7. Measured: 1.7e-6 and 0.021, pixels by 1 and 6.
    assert np.abs(drawn["image"] - prepared.image).max() <= (0.04 if short else 1e-5)
    assert np.abs(drawn["pixels"].astype(int) - prepared.pixels).max() <= (9 if short else 1)
    assert short == (np.abs(drawn["image"] - prepared.image).max() > 1e-3), "not executed in the graph's type"
    engine.close()


def test_outputs_that_are_not_bound_are_not_delivered(prepared: Prepared) -> None:
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    opened(prepared).bind({"latents": prepared.latents, "pixels": pixels})()
    assert np.abs(pixels.astype(int) - prepared.pixels).max() <= 9


def test_two_bindings_of_one_engine(prepared: Prepared) -> None:
    """As the denoising loop has them: each launch reads its buffers anew, and writes into no other's."""
    engine = opened(prepared)
    latents = [prepared.latents.copy(), np.zeros_like(prepared.latents)]
    pixels = [np.zeros((1, 64, 64, 3), np.uint8) for _ in latents]
    launches = [engine.bind({"latents": x, "pixels": y}) for x, y in zip(latents, pixels, strict=True)]
    for launch in launches:
        launch()
    first, of_zeros = (p.copy() for p in pixels)
    assert not np.array_equal(first, of_zeros)
    latents[1][...] = latents[0]
    launches[1]()
    assert np.array_equal(pixels[1], first)
    assert np.array_equal(pixels[0], first)


BAD_BUFFERS = [
    ({}, "a buffer is missing"),
    ({"latents": np.zeros((1, 4, 8, 9), np.float32)}, "a buffer does not fit"),
    ({"latents": np.zeros((1, 4, 8, 8), np.float64)}, "a buffer does not fit"),
    ({"latents": np.zeros((8, 8, 4, 1), np.float32).T}, "a buffer does not fit"),
    ({"latents": np.zeros((1, 4, 8, 8), np.float32), "pixels": np.zeros((1, 64, 64), np.uint8)}, "does not fit"),
]


@pytest.mark.parametrize(("buffers", "message"), BAD_BUFFERS)
def test_buffers_that_do_not_fit(prepared: Prepared, buffers: dict[str, Any], message: str) -> None:
    with pytest.raises(EngineError, match=message):
        opened(prepared).bind(buffers)


def test_an_engine_with_another_signature(prepared: Prepared) -> None:
    wrong = GraphSpec((TensorSpec("latents", "float32", (2, 4, 8, 8)),), prepared.spec.outputs)
    with pytest.raises(EngineError, match="other inputs than its manifest says"):
        opened(prepared, spec=wrong)
    wrong = GraphSpec(prepared.spec.inputs, prepared.spec.outputs[:1])
    with pytest.raises(EngineError, match="other outputs than its manifest says"):
        opened(prepared, spec=wrong)


# --- damaged files ----------------------------------------------------------------------------------------------------


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1000])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = [
    ("model.blob", Path.unlink, "an engine's file cannot be read"),
    ("model.blob", cut, "an engine is not as it was built"),
    ("model.blob", flip, "an engine is not as it was built"),
    ("engine.json", Path.unlink, "facts are missing or cannot be read"),
    ("weights.safetensors", Path.unlink, "an engine's file cannot be read"),
    ("weights.safetensors", cut, "a weight file is not the engine's"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGE, ids=[f"{n}-{d.__name__}" for n, d, _ in DAMAGE])
def test_damaged_files(prepared: Prepared, name: str, damage: Any, message: str, tmp_path: Path) -> None:
    shutil.copytree(prepared.engine, tmp_path, dirs_exist_ok=True)
    weights = {"weights": Path(shutil.copy(prepared.weights["weights"], tmp_path))}
    damage(tmp_path / name)
    with pytest.raises(EngineError, match=message) as error:
        RUNNER.open(tmp_path, weights, prepared.spec, ONE_THREAD, HostMemory())
    assert "build the bundle again" in str(error.value.hint)


# --- what an engine holds ---------------------------------------------------------------------------------------------


def test_an_engine_holds_no_weight(prepared: Prepared) -> None:
    assert sorted(f.name for f in prepared.engine.iterdir()) == ["engine.json", "model.blob"]
    assert copied_weights(prepared.engine / "model.blob", prepared.weights["weights"]) == []


@pytest.mark.parametrize("dtype", ["float32", BFLOAT16])
@pytest.mark.parametrize("transposed", [0, 1])
def test_a_gemm_is_stored_once(dtype: str, transposed: int, tmp_path: Path) -> None:
    """Its weight, 1 MiB in float32, by itself would be copied into the exported model in bfloat16."""
    data, array = (
        {"float32": ir.DataType.FLOAT, "bfloat16": ir.DataType.BFLOAT16}[dtype],
        np.random.default_rng(0).standard_normal((512, 512)),
    )
    kind, size = {"float32": (np.float32, "F32"), "bfloat16": (ml_dtypes.bfloat16, "BF16")}[dtype]
    made = {"w": array.astype(kind), "b": array[0].astype(kind)}
    x, y = value("x", (2, 512)), value("y", (2, 512))
    cast, product = (value(name, (2, 512), data) for name in ("cast", "product"))
    w, b = (value(name, a.shape, data) for name, a in made.items())
    w.const_value, b.const_value = placeholder("w", data, (512, 512)), placeholder("b", data, (512,))
    nodes = [
        ir.node("Cast", [x], {"to": data}, outputs=[cast], name="cast"),
        ir.node("Gemm", [cast, w, b], {"transA": 0, "transB": transposed, "beta": 1.0}, outputs=[product], name="one"),
        ir.node("Cast", [product], {"to": ir.DataType.FLOAT}, outputs=[y], name="widen"),
    ]
    ir.save(BUILDER.prepare(model(nodes, [x], [y], [w, b])), tmp_path / "graph.onnx")
    weights = {"weights": tmp_path / "weights.safetensors"}
    tensors = [(name, size, a.shape) for name, a in made.items()]
    write_safetensors(weights["weights"], tensors, lambda name: made[name].tobytes())
    BUILDER.build(tmp_path / "graph.onnx", weights, tmp_path, OpenVinoOptions())
    assert (tmp_path / "model.blob").stat().st_size < 32_768
    spec = GraphSpec((TensorSpec("x", "float32", (2, 512)),), (TensorSpec("y", "float32", (2, 512)),))
    ends = {"x": array[:2].astype(np.float32), "y": np.zeros((2, 512), np.float32)}
    RUNNER.open(tmp_path, weights, spec, ONE_THREAD, HostMemory()).bind(ends)()
    turned = array.T if transposed else array
    expected = ends["x"] @ turned + array[0]
    assert np.abs(ends["y"] - expected).max() <= (0.01 if dtype == "bfloat16" else 1e-5) * np.abs(expected).max()


def test_what_is_multiplied_by_one_is_left_as_it_is() -> None:
    x, y, one, two = (
        value("x", (2, 3)),
        value("y", (2, 3)),
        constant("one", np.float32(1)),
        constant("two", np.float32(2)),
    )
    row, factor = constant("row", np.ones((1, 1, 3), np.float32)), value("factor", ())
    factor.const_value = placeholder("factor", ir.DataType.FLOAT, ())
    nodes, before = [], x
    for op, by in (("Div", one), ("Mul", two), ("Mul", one), ("Div", row), ("Mul", factor), ("Mul", one)):
        nodes.append(ir.node(op, [before, by], outputs=[value(f"y{len(nodes)}", (2, 3))], name=f"{op}{len(nodes)}"))
        before = nodes[-1].outputs[0]
    nodes.append(ir.node("Div", [before, one], outputs=[y], name="last"))
    prepared = BUILDER.prepare(model(nodes, [x], [y], [one, two, row, factor]))
    # Another shape, a weight, and what is an output itself stay.
    assert [node.name for node in prepared.graph] == ["Mul1", "Div3", "Mul4", "last"]
    assert [node.name for node in nodes] == ["Div0", "Mul1", "Mul2", "Div3", "Mul4", "Mul5", "last"]


# --- precision --------------------------------------------------------------------------------------------------------


def engine_facts(folder: Path) -> Any:
    return json.loads((folder / "engine.json").read_text())


def test_executed_types_are_those_of_the_graph(prepared: Prepared) -> None:
    facts = engine_facts(prepared.engine)
    assert facts["precision"]["asked"] == {prepared.dtype: 31}
    assert facts["precision"]["wide"] == {}
    for kind in ("Convolution", "FullyConnected", "MVN"):
        assert facts["layers"]["kinds"][kind].keys() == {prepared.dtype}, kind


ROUNDING = [{"INFERENCE_PRECISION_HINT": "bf16"}, {"EXECUTION_MODE_HINT": "PERFORMANCE"}]
"""With these OpenVINO computes a graph of float32 in bfloat16; no property widens one of bfloat16."""


@need_bfloat16
@pytest.mark.parametrize("properties", ROUNDING)
@pytest.mark.parametrize("prepared", ["float32"], indirect=True)
def test_less_than_the_graph_has_fails_the_build(
    prepared: Prepared, properties: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(openvino_build, "settings", lambda options: settings(options) | properties)
    with pytest.raises(EngineError, match="another precision than the graph's float32") as error:
        BUILDER.build(prepared.graph, prepared.weights, tmp_path, OpenVinoOptions())
    assert error.value.expected == "31 convolutions and products in float32"
    assert "in less: node_MatMul_" in str(error.value.got)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("prepared", [BFLOAT16], indirect=True)
def test_more_than_the_graph_has_fails_the_build(
    prepared: Prepared, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a CPU whose kernels widen every value."""

    def widened(compiled: Any, graph: Any) -> list[Layer]:
        return [dataclasses.replace(layer, dtypes=frozenset({"float32"})) for layer in executed_layers(compiled, graph)]

    monkeypatch.setattr(openvino_build, "executed_layers", widened)
    with pytest.raises(EngineError, match="another precision than the graph's bfloat16") as error:
        BUILDER.build(prepared.graph, prepared.weights, tmp_path, OpenVinoOptions())
    assert error.value.expected == "31 convolutions and products in bfloat16"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module")
def short_bundle(tiny_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with its denoiser in bfloat16, for two buckets."""
    if not has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    folder = tmp_path_factory.mktemp("short")
    components = '[components.denoiser]\ndtype = "bfloat16"\n'
    (folder / "tiny.toml").write_text(f'backend = "openvino"\nwithout = ["vae_encoder"]\n{RECIPE}\n{components}')
    toolchain.build(folder / "tiny.toml", str(tiny_model), folder / "bundle", store=store)
    return folder / "bundle"


FOLDED = {"text_encoder": ["embeddings.position_embedding.weight"]}
"""What a graph takes a constant part of, which OpenVINO works out."""


def test_buckets_share_one_weight_file(short_bundle: Path) -> None:
    bundle = toolchain.read_bundle(short_bundle)
    for component, entries in bundle.engines.items():
        weights = f"engines/{component}/weights.safetensors"
        assert {name for entry in entries.values() for name in entry.weights.values()} == {weights}
        for entry in entries.values():
            blob = bundle.path / entry.folder / "model.blob"
            assert copied_weights(blob, bundle.path / weights) == FOLDED.get(component, [])


def test_the_sampler_stays_in_float32(short_bundle: Path) -> None:
    """All that the executed model does between the state, the last layer of the network, and the next state."""
    bundle = toolchain.read_bundle(short_bundle)
    entry = bundle.engine("denoiser", BUCKET)
    assert engine_facts(bundle.path / entry.folder)["precision"]["asked"].keys() == {"bfloat16"}
    assert {t.dtype for t in (*entry.spec.inputs, *entry.spec.outputs)} == {"float32", "int64"}
    engine: Any = open_engine(bundle, RUNNER, "denoiser", BUCKET, HostMemory())
    operators = engine._compiled.get_runtime_model().get_ordered_ops()
    waiting = [o for o in operators if o.get_friendly_name().startswith("next_state")]
    executed: dict[str, tuple[str, str]] = {}
    borders = []
    while waiting:
        operator = waiting.pop()
        about = {key: str(v.value) for key, v in operator.get_rt_info().items()}
        if (about["runtimePrecision"], about["outputPrecisions"]) == ("bf16", "f32"):
            borders.append(operator)  # widens what the network gives
            continue
        executed[operator.get_friendly_name()] = (about["layerType"], about["runtimePrecision"])
        waiting += [source.get_node() for source in operator.input_values()]
    (border,) = {o.get_friendly_name(): o for o in borders}.values()
    assert "Convolution" in {str(v.get_node().get_rt_info()["layerType"].value) for v in border.input_values()}
    assert {kind for kind, _ in executed.values()} >= {"Input", "MatMul", "Subgraph", "Gather"}
    counts = Counter(dtype for _, dtype in executed.values())
    assert counts.keys() <= {"f32", "i32", "i64", "u8"}
    assert counts["f32"] >= 20


# --- memory -----------------------------------------------------------------------------------------------------------


def test_memory_is_counted_from_what_is_executed(prepared: Prepared) -> None:
    """All weights but biases and factors of norms are packed, in the type of the graph, channels by blocks."""
    facts, size = engine_facts(prepared.engine), 2 if prepared.dtype == "bfloat16" else 4
    header = read_header(prepared.weights["weights"])
    assert facts["mapped_bytes"] == prepared.weights["weights"].stat().st_size
    packed = sum(ref.nbytes for ref in header.values() if len(ref.shape) > 1)
    assert packed <= facts["packed_bytes"] <= 1.05 * packed
    # The largest layers: 16 channels at full size go in and out of the last blocks, with one beside them.
    assert facts["activation_bytes"] == facts["arena_bytes"]
    assert 2 * 16 * 64 * 64 * size <= facts["activation_bytes"] <= 4 * 16 * 64 * 64 * size
    kinds = {kind: sum(counts.values()) for kind, counts in facts["layers"]["kinds"].items()}
    assert facts["session_bytes"] == sum(KERNEL_BYTES.get(kind, 0) * count for kind, count in kinds.items())


# --- options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (OpenVinoOptions(), (physical_cores(), True, "set()")),
        (OpenVinoOptions(threads=1), (1, True, "set()")),
        (OpenVinoOptions(pin_threads=False), (physical_cores(), False, "set()")),
        (OpenVinoOptions(tensor_parallel=True), (physical_cores(), True, "TENSOR_PARALLEL")),
    ],
)
def test_options_reach_the_opened_engine(prepared: Prepared, options: OpenVinoOptions, expected: Any) -> None:
    """Whatever the engine was built with: all but the device are no part of it."""
    read = opened(prepared, options)._compiled.get_property
    threads, pinned, policy = expected
    assert (read("INFERENCE_NUM_THREADS"), read("ENABLE_CPU_PINNING")) == (threads, pinned)
    assert policy in str(read("MODEL_DISTRIBUTION_POLICY"))
    assert read("NUM_STREAMS") == 1
    assert str(read("EXECUTION_MODE_HINT")) == "ExecutionMode.ACCURACY"
