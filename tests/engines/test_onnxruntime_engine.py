"""The ONNX Runtime backend: what it refuses, what it shares, and that its levels agree with torch."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.tiny import recipe_for
from toolchain.engines.buffers import HostMemory
from toolchain.engines.builders import BUILDERS, builder_of
from toolchain.engines.cpu import cpu_features, physical_cores
from toolchain.engines.onnxruntime.build import OnnxRuntimeBuilder
from toolchain.engines.onnxruntime.run import OnnxRuntimeRunner
from toolchain.engines.runners import RUNNERS, runner_of
from toolchain.errors import EngineError, UsageError
from toolchain.export.capture import capture
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.recipe import Bucket
from toolchain.recipe.options import OnnxRuntimeOptions
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.mapped import read_header
from toolchain.weights.safetensors import read_folder

BUCKET = Bucket(1, 64, 64)
VAE = MODELS["sd"].component("vae_decoder")
BUILDER, RUNNER = OnnxRuntimeBuilder(), OnnxRuntimeRunner()
BASIC = OnnxRuntimeOptions("basic", threads=1)


@pytest.fixture(scope="module", params=["float32", "float16"])
def prepared(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The decoder's graph and weight file, its signature, inputs and torch's outputs in float32."""
    folder = tmp_path_factory.mktemp(request.param)
    source = resolve_model(str(tiny_model))
    graph = BUILDER.prepare(capture(VAE, source, recipe_for("vae_decoder", dtype=request.param), BUCKET))
    ir.save(graph, folder / "graph.onnx")
    uses = weight_uses(graph)
    write_weights(uses, find_tensors(uses, read_folder(tiny_model / "vae"), folder), folder / "weights.safetensors")
    latents = np.random.default_rng(0).standard_normal((1, 4, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = VAE.reference(source, recipe_for())(torch.from_numpy(latents))
    return request.param, folder, VAE.spec(source, BUCKET, recipe_for()), latents, [e.numpy() for e in expected]


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_every_level_equals_torch(prepared: Any, level: str, tmp_path: Path) -> None:
    dtype, folder, spec, latents, (pixels, image) = prepared
    options = OnnxRuntimeOptions(level, threads=1)  # type: ignore[arg-type]
    weights, packed = {"weights": folder / "weights.safetensors"}, {}
    pack = BUILDER.packer(options)
    if pack is not None:
        (tmp_path / "packed").mkdir()
        pack(folder / "graph.onnx", weights, tmp_path / "packed")
        weights["packed"] = tmp_path / "packed" / "packed.safetensors"
        shutil.copy(weights["packed"], folder)
        packed = read_header(weights["packed"])
    out = tmp_path / "engine"
    out.mkdir()
    BUILDER.build(folder / "graph.onnx", weights, out, options)
    engine = RUNNER.open(out, weights, spec, options, HostMemory())
    found = {t.name: np.zeros(t.shape, t.dtype) for t in spec.outputs}
    engine.bind({"latents": latents, **found})()
    tolerance = 1e-5 if dtype == "float32" else 5e-3
    assert np.abs(found["image"] - image).max() <= tolerance
    assert np.abs(found["pixels"].astype(int) - pixels).max() <= 1 + (dtype == "float16")
    # What is made once is shared: the graph holds nothing that a weight file holds.
    assert sorted(f.name for f in out.iterdir()) == ["engine.json", "graph.onnx"]
    assert inline_bytes(out / "graph.onnx") < 16_384
    assert bool(packed) == (level == "all")
    engine.close()


def inline_bytes(graph: Path) -> int:
    tensors = [v.const_value for v in ir.load(graph).graph.initializers.values()]
    return sum(t.nbytes for t in tensors if t is not None and not isinstance(t, ir.ExternalTensor))


def opened(prepared: Any, out: Path, spec: GraphSpec | None = None) -> Any:
    _, folder, right, _, _ = prepared
    weights = {"weights": folder / "weights.safetensors"}
    BUILDER.build(folder / "graph.onnx", weights, out, BASIC)
    return RUNNER.open(out, weights, spec or right, BASIC, HostMemory())


def test_outputs_that_are_not_bound_are_not_delivered(prepared: Any, tmp_path: Path) -> None:
    engine = opened(prepared, tmp_path)
    pixels = np.zeros((1, 64, 64, 3), np.uint8)
    engine.bind({"latents": prepared[3], "pixels": pixels})()
    assert pixels.any()


BAD_BUFFERS = [
    ({}, "a buffer is missing"),
    ({"latents": np.zeros((1, 4, 8, 9), np.float32)}, "a buffer does not fit"),
    ({"latents": np.zeros((1, 4, 8, 8), np.float64)}, "a buffer does not fit"),
    ({"latents": np.zeros((8, 8, 4, 1), np.float32).T}, "a buffer does not fit"),
]


@pytest.mark.parametrize(("buffers", "message"), BAD_BUFFERS)
def test_buffers_that_do_not_fit(prepared: Any, tmp_path: Path, buffers: dict[str, Any], message: str) -> None:
    engine = opened(prepared, tmp_path)
    with pytest.raises(EngineError, match=message):
        engine.bind(buffers)


def test_an_engine_with_another_signature(prepared: Any, tmp_path: Path) -> None:
    wrong = GraphSpec((TensorSpec("latents", "float32", (2, 4, 8, 8)),), prepared[2].outputs)
    with pytest.raises(EngineError, match="other inputs than its manifest says"):
        opened(prepared, tmp_path, wrong)


def test_a_graph_that_cannot_be_read(prepared: Any, tmp_path: Path) -> None:
    opened(prepared, tmp_path)
    (tmp_path / "graph.onnx").write_bytes(b"not a graph")
    with pytest.raises(EngineError, match="cannot open the graph"):
        RUNNER.open(
            tmp_path,
            {"weights": prepared[1] / "weights.safetensors"},
            prepared[2],
            BASIC,
            HostMemory(),
        )


def test_devices() -> None:
    here = BUILDER.device()
    assert RUNNER.available() is None
    assert RUNNER.refuse(here, BASIC) is None
    assert RUNNER.refuse({**here, "onnxruntime": here["onnxruntime"].rsplit(".", 1)[0] + ".99"}, BASIC) is None
    assert "0.9.0" in str(RUNNER.refuse({**here, "onnxruntime": "0.9.0"}, BASIC))
    reason = str(RUNNER.refuse({**here, "cpu": "aarch64"}, BASIC))
    assert "aarch64" in reason
    assert cpu_features() in reason
    assert physical_cores() >= 1


def test_an_unknown_backend() -> None:
    names = ["onnxruntime", "onnxruntime_cuda", "openvino", "tensorrt", "tensorrt_rtx"]
    assert list(BUILDERS) == list(RUNNERS) == names
    assert [(b.name, r.name) for b, r in zip(BUILDERS.values(), RUNNERS.values(), strict=True)] == [
        (name, name) for name in BUILDERS
    ]
    for find in (builder_of, runner_of):
        with pytest.raises(UsageError, match="unknown backend"):
            find("tensorrtt")


def test_buckets_share_the_pages_of_their_weights(tiny_bundle: Path) -> None:
    """The weight files are mapped, not read: every graph points into them by offset."""
    for bucket in ("1x64x64", "2x64x96"):
        graph = tiny_bundle / "engines" / "denoiser" / bucket / "graph.onnx"
        tensors = [v.const_value for v in ir.load(graph).graph.initializers.values()]
        attached = [t for t in tensors if isinstance(t, ir.ExternalTensor)]
        assert {t.location for t in attached} == {"weights.safetensors", "packed.safetensors"}
        sizes = {f: (tiny_bundle / "engines" / "denoiser" / f).stat().st_size for f in {t.location for t in attached}}
        assert all((t.offset or 0) + (t.length or 0) <= sizes[t.location] for t in attached)
        assert inline_bytes(graph) < 65_536


def test_a_weight_file_that_is_missing(prepared: Any, tmp_path: Path) -> None:
    opened(prepared, tmp_path)
    missing = {"weights": tmp_path / "nowhere" / "weights.safetensors"}
    with pytest.raises(EngineError, match="cannot open the graph"):
        RUNNER.open(tmp_path, missing, prepared[2], BASIC, HostMemory())
