"""The backend tensorrt_rtx opened and run, on the pretended TensorRT for RTX and GPU: validity, kernels, captures."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from tests.build_graph import SPEC, X, Y, options, write_network
from tests.pretend import pretended
from tests.profile_contract import check_two_buckets
from toolchain.cli.main import cli
from toolchain.engines.tensorrt_rtx.build import TensorRtRtxBuilder
from toolchain.engines.tensorrt_rtx.run import TensorRtRtxRunner
from toolchain.errors import EngineError

BUILDER, RUNNER = TensorRtRtxBuilder(), TensorRtRtxRunner()
ADA = {"FAKE_CUDA_CC": "8.9", "FAKE_CUDA_GPU": "NVIDIA GeForce RTX 4090", "FAKE_CUDA_SMS": "128"}


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def trt(cache: Path) -> Iterator[Any]:
    with pretended(DIFFBUILD_CACHE=str(cache), **ADA) as tensorrt:
        import tensorrt_rtx

        yield tensorrt_rtx
        assert tensorrt.violations == []


def build(folder: Path, **given: Any) -> Path:
    write_network(folder)
    out = folder / "engine"
    out.mkdir()
    weights = {"weights": folder / "weights.safetensors"}
    BUILDER.build(folder / "graph.onnx", weights, out, options("tensorrt_rtx", **given))
    return out


def run(engine_folder: Path, **given: Any) -> Any:
    """What the engine makes of X, opened without its weight file; and the memory's counters."""
    chosen = options("tensorrt_rtx", **given)
    memory = RUNNER.memory([engine_folder], chosen)
    try:
        engine = RUNNER.open(engine_folder, {}, SPEC, chosen, memory)
        x, y = (memory.zeros(t.shape, t.dtype) for t in (*SPEC.inputs, *SPEC.outputs))
        launch = engine.bind({"x": x, "y": y})
        memory.write(x, X)
        launch()
        (found,) = memory.read(y)
        captures = memory.counters.captures
        engine.close()
    finally:
        memory.close()
    return found, captures


def finished() -> list[str]:
    from tensorrt_rtx._engine import finished

    return finished


def kernels(cache: Path) -> list[Path]:
    return sorted((cache / "kernels").glob("*.cache"))


def test_it_computes_from_a_captured_graph(trt: Any, tmp_path: Path) -> None:
    found, captures = run(build(tmp_path))
    np.testing.assert_allclose(found, Y, rtol=1e-2)
    assert captures == 1


@pytest.mark.parametrize("cuda_graph", ["step", "loop", "off"])
def test_both_buckets_of_one_engine(trt: Any, tmp_path: Path, cuda_graph: str) -> None:
    check_two_buckets(tmp_path, "tensorrt_rtx", cuda_graph=cuda_graph)


@pytest.mark.parametrize("strategy", ["eager", "lazy", "none"])
def test_contexts_are_made_as_the_recipe_says(
    trt: Any, tmp_path: Path, strategy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []
    create = trt.ICudaEngine.create_execution_context

    def recorded(engine: Any, config: Any) -> Any:
        made.append(config)
        return create(engine, config)

    folder = build(tmp_path)
    monkeypatch.setattr(trt.ICudaEngine, "create_execution_context", recorded)
    run(folder, kernel_specialization=strategy)
    (config,) = made
    assert config.dynamic_shapes_kernel_specialization_strategy.name == strategy.upper()
    assert config.cuda_graph_strategy.name == "DISABLED"
    assert config.get_execution_context_allocation_strategy().name == "USER_MANAGED"


def test_what_cannot_be_captured_is_launched_without_a_graph(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path)
    monkeypatch.setenv("FAKE_TENSORRT_RTX_FAIL", "not_capturable")
    found, captures = run(folder)
    np.testing.assert_allclose(found, Y, rtol=1e-2)
    assert captures == 0
    assert caplog.messages == [
        "work is launched without a CUDA graph: the engine's library says that it cannot be captured"
    ]


# --- which GPUs -------------------------------------------------------------------------------------------------------


RUNS = [
    ((), "8.0", True),
    ((), "9.0", True),
    ((), "12.0", True),
    ((), "7.5", False),
    (("8.9", "12.0"), "8.9", True),
    (("8.9", "12.0"), "8.6", False),
]


@pytest.mark.parametrize(("targets", "capability", "runs"), RUNS)
def test_gpus_that_an_engine_runs_on(targets: tuple[str, ...], capability: str, runs: bool) -> None:
    with pretended(FAKE_CUDA_CC=capability, FAKE_CUDA_GPU="NVIDIA X"):
        reason = RUNNER.refuse(BUILDER.device(), options("tensorrt_rtx", targets=targets))
    assert (reason is None) == runs
    if reason:
        wanted = ", ".join(targets) or "8.0 and newer"
        assert reason == (
            f"compiled for compute capability {wanted}, this machine has NVIDIA X (compute capability {capability})"
        )


def test_engines_of_another_version(trt: Any) -> None:
    reason = RUNNER.refuse(BUILDER.device() | {"tensorrt_rtx": "1.8.0.1"}, options("tensorrt_rtx"))
    assert reason == (
        "built with TensorRT for RTX 1.8.0.1, this machine has 1.7.1.116, and the engines need that version"
    )


def test_the_library_has_the_last_word(trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = build(tmp_path, targets=("12.0",))
    with pytest.raises(EngineError, match="TensorRT for RTX cannot run the engine on this GPU") as error:
        run(folder, targets=("12.0",))
    assert "unsupported cc: NVIDIA GeForce RTX 4090 (compute capability 8.9), TensorRT for RTX 1.7.1.116" in str(
        error.value.got
    )
    assert not kernels(tmp_path / "cache")


def test_a_slow_engine_is_told(
    trt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path)
    monkeypatch.setenv("FAKE_TENSORRT_RTX_FAIL", "suboptimal")
    run(folder)
    (told,) = caplog.messages
    assert "the engine is not the best for this GPU: no reason given: NVIDIA GeForce RTX 4090" in told


def test_a_truncated_plan(trt: Any, tmp_path: Path) -> None:
    folder = build(tmp_path)
    plan = folder / "engine.plan"
    content = plan.read_bytes()
    plan.write_bytes(content[:-100])
    with pytest.raises(EngineError, match="an engine's plan cannot be read"):
        run(folder)
    plan.write_bytes(b"x" * len(content))
    with pytest.raises(EngineError, match=r"cannot run the engine on this GPU[\s\S]*malformed engine"):
        run(folder)
    plan.write_bytes(content[:-100] + b"x" * 100)
    with pytest.raises(EngineError, match="TensorRT cannot open the engine"):
        run(folder)


# --- finished kernels -------------------------------------------------------------------------------------------------


def test_kernels_are_kept_for_the_next_process(trt: Any, tmp_path: Path, cache: Path) -> None:
    folder = build(tmp_path)
    run(folder)
    assert len(finished()) == 1
    (first,) = kernels(cache)
    run(folder)
    assert len(finished()) == 1
    assert kernels(cache) == [first]


def damaged(content: bytes) -> bytes:
    return content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]


SPOILED = {
    "a byte": (damaged, "its content was changed"),
    "cut short": (lambda content: content[: len(content) // 2], "its content was changed"),
    "empty": (lambda content: b"", "it is no file of kernels"),
    "of another plan": (
        lambda content: content.replace(b'"driver": "13', b'"driver": "12'),
        'they are for {"compute_capability": "8.9", "driver": "12',
    ),
}


@pytest.mark.parametrize("how", SPOILED)
def test_kernels_that_do_not_fit_are_thrown_away(
    trt: Any, tmp_path: Path, cache: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path)
    run(folder)
    (kept,) = kernels(cache)
    good = kept.read_bytes()
    spoil, reason = SPOILED[how]
    kept.write_bytes(spoil(good))
    found, _ = run(folder)
    np.testing.assert_allclose(found, Y, rtol=1e-2)
    (told,) = caplog.messages
    assert told.startswith(f"finished kernels are thrown away: {kept}: {reason}")
    assert len(finished()) == 2
    assert kept.read_bytes() == good  # written anew


def test_kernels_that_the_library_refuses(
    trt: Any, tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path)
    run(folder)
    monkeypatch.setenv("FAKE_TENSORRT_RTX_FAIL", "cache_refused")
    run(folder)
    assert caplog.messages == [
        f"finished kernels are thrown away: {kernels(cache)[0]}: TensorRT for RTX does not take them"
    ]


def test_each_gpu_has_kernels_of_its_own(tmp_path: Path, cache: Path) -> None:
    with pretended(DIFFBUILD_CACHE=str(cache), **ADA):
        folder = build(tmp_path)
        run(folder)
    (first,) = kernels(cache)
    with pretended(DIFFBUILD_CACHE=str(cache), FAKE_CUDA_CC="12.0", FAKE_CUDA_GPU="NVIDIA GeForce RTX 5090"):
        run(folder)
        assert len(finished()) == 1
    assert len(kernels(cache)) == 2
    shutil.copyfile(first, next(path for path in kernels(cache) if path != first))
    with pretended(DIFFBUILD_CACHE=str(cache), FAKE_CUDA_CC="12.0", FAKE_CUDA_GPU="NVIDIA GeForce RTX 5090"):
        run(folder)
        assert len(finished()) == 1  # those of the other GPU were not taken


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(
    trt: Any, tmp_path: Path, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = build(tmp_path)
    cache.write_text("in the way")
    found, _ = run(folder)
    np.testing.assert_allclose(found, Y, rtol=1e-2)
    assert any("kernels" in line for line in caplog.messages)


def test_plain_tensorrt_keeps_no_kernels(trt: Any, tmp_path: Path, cache: Path) -> None:
    check_two_buckets(tmp_path)
    assert not kernels(cache)


# --- a whole bundle ---------------------------------------------------------------------------------------------------

RECIPE = """\
family = "sd"
backend = "{backend}"
buckets = ["1x64x64", "2x64x96"]
[sampling]
scheduler = "euler"
steps = 4
schedulers = ["euler"]
step_counts = [4]
[check]
prompts = ["a"]
"""


def drawn(bundle: Path) -> list[Any]:
    import toolchain

    pipe = toolchain.load(bundle)
    try:
        return [np.asarray(image, np.int16) for image in pipe(["a red circle"] * 2, seed=[3, 4], size=(64, 96)).images]
    finally:
        pipe.close()


def test_a_bundle_draws_what_the_cpu_draws(
    tiny_model: Path, store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import toolchain
    from toolchain.errors import BundleError

    for backend in ("onnxruntime", "tensorrt_rtx"):
        (tmp_path / f"{backend}.toml").write_text(RECIPE.format(backend=backend))
    host = toolchain.build(tmp_path / "onnxruntime.toml", str(tiny_model), tmp_path / "host", store=store)
    expected = drawn(host.path)
    with pretended(DIFFBUILD_CACHE=str(tmp_path / "cache"), **ADA) as trt:
        made = toolchain.build(tmp_path / "tensorrt_rtx.toml", str(tiny_model), tmp_path / "rtx", store=store)
        assert not [name for name in made.files if name.endswith(".safetensors")]  # the plans hold the weights
        found = drawn(made.path)
        assert trt.violations == []
        assert all(np.abs(a - b).max() <= 1 for a, b in zip(expected, found, strict=True))
        told = CliRunner().invoke(cli, ["inspect", str(made.path)]).output
        assert "layers, by kind and by the smallest type that they touch, for compute capability 8.0 and newer:" in told
        (line,) = (line for line in told.splitlines() if line.strip().startswith("denoiser profiles"))
        assert re.search(r"denoiser profiles +\S+ k?B +0 fused +kgen \d+ float32", line), line
        engines = json.loads(CliRunner().invoke(cli, ["inspect", str(made.path), "--json"]).output)["engines"]
        assert engines["denoiser profiles"]["precision"]["asked"]["float32"] > 10
    with (
        pretended(DIFFBUILD_CACHE=str(tmp_path / "another"), **ADA),
        pytest.raises(BundleError, match=r"sign|built here|vouch"),
    ):
        toolchain.load(made.path)  # a plan is machine code, and this user built none
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "cache"))
    drawing = CliRunner().invoke(cli, ["generate", str(made.path), "a", "--output", str(tmp_path / "a.png")])
    assert drawing.exit_code == 1
    assert "the bundle cannot run here" in drawing.output


def test_a_bundle_with_an_engine_for_each_bucket(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    import toolchain

    text = RECIPE.format(backend="tensorrt_rtx") + '[tensorrt_rtx]\nprofile_per_bucket = false\ntargets = ["8.9"]\n'
    (tmp_path / "own.toml").write_text(text)
    with pretended(DIFFBUILD_CACHE=str(tmp_path / "cache"), **ADA) as trt:
        made = toolchain.build(tmp_path / "own.toml", str(tiny_model), tmp_path / "own", store=store)
        assert {Path(entry.folder).name for entry in made.engines["denoiser"].values()} == {"1x64x64", "2x64x96"}
        told = CliRunner().invoke(cli, ["inspect", str(made.path)]).output
        assert "touch, for compute capability 8.9:" in told
        first, second = drawn(made.path)
        assert not np.array_equal(first, second)
        assert trt.violations == []
