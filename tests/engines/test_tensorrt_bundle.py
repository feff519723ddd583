"""`diffbuild build` with the TensorRT backend, from the tiny model to a bundle, on the pretended TensorRT."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import toolchain
from tests.pretend import pretended
from toolchain.builder.plan import Plan
from toolchain.builder.steps import StepId
from toolchain.bundle.bundle import ANY
from toolchain.cli.main import cli
from toolchain.errors import EngineError, RecipeError
from toolchain.store.artifacts import Store

RECIPE = """\
family = "sd"
backend = "tensorrt"
buckets = ["1x64x64"]
without = ["vae_encoder"]

[components.denoiser]
dtype = "float16"

[components.vae_decoder]
dtype = "bfloat16"

[sampling]
scheduler = "euler"
steps = 4
schedulers = ["euler"]
step_counts = [4]

[check]
prompts = ["a red circle on a white background"]
"""
FIRST = StepId("engine", "text_encoder", ANY)
ENGINES = ["engine tiny text_encoder any", "engine tiny denoiser 1x64x64", "engine tiny vae_decoder 1x64x64"]


@pytest.fixture(scope="module", autouse=True)
def _gpu(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pretended(DIFFBUILD_CACHE=str(tmp_path_factory.mktemp("cache"))):
        yield


@pytest.fixture(scope="module")
def own_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tensorrt") / "store"


def recipe(folder: Path, old: str = "", new: str = "") -> Path:
    assert old in RECIPE
    path = folder / "tiny.toml"
    path.write_text(RECIPE.replace(old, new, 1) if old else RECIPE + new)
    return path


def misses(plan: Plan) -> list[str]:
    return [step.name for step in plan.steps if not step.hit]


def is_sound(store: Path) -> bool:
    """Whether nothing half done lies in a store."""
    return Store(store).verify() == [] and not any((store / ".tmp").iterdir())


@pytest.fixture(scope="module")
def failed(own_store: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> EngineError:
    """The error of a first build, which ran out of memory and left its graphs in the store."""
    folder = tmp_path_factory.mktemp("failed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAKE_TENSORRT_FAIL", "out_of_memory")
        with pytest.raises(EngineError) as error:
            toolchain.build(recipe(folder), str(tiny_model), folder / "bundle", store=own_store)
    return error.value


@pytest.fixture(scope="module")
def bundle(
    failed: EngineError, own_store: Path, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> toolchain.Bundle:
    """Built after the failed build, from what that one left."""
    folder = tmp_path_factory.mktemp("built")
    text_encoder, denoiser, vae_decoder = ENGINES
    left = [text_encoder, "weights tiny denoiser", denoiser, "weights tiny vae_decoder", vae_decoder]
    assert misses(toolchain.plan_build(recipe(folder), str(tiny_model), store=own_store)) == left
    return toolchain.build(recipe(folder), str(tiny_model), folder / "bundle", store=own_store)


def test_a_failed_build_names_its_engine_and_leaves_the_store_whole(failed: EngineError, own_store: Path) -> None:
    assert failed.what == "engine text_encoder any: TensorRT could not build the engine"
    assert "out of GPU memory" in str(failed.got)
    assert is_sound(own_store)
    assert not any(a.stage == "engine" for a in Store(own_store).artifacts())


def test_the_next_build_goes_on_from_there(bundle: toolchain.Bundle) -> None:
    bundle.verify()
    facts = {c: json.loads((place(bundle, c) / "engine.json").read_text()) for c in bundle.engines}
    asked = {component: set(f["precision"]["asked"]) for component, f in facts.items()}
    assert asked == {"text_encoder": {"float32"}, "denoiser": {"float16"}, "vae_decoder": {"bfloat16"}}
    assert all(f["precision"]["wide"] == {} for f in facts.values())
    assert all(f["device"] == bundle.device for f in facts.values())
    assert bundle.device["name"] == "NVIDIA H200"


def place(bundle: toolchain.Bundle, component: str) -> Path:
    return bundle.path / bundle.engine(component, bundle.buckets[0]).folder


def test_inspect_says_that_it_runs_here(bundle: toolchain.Bundle) -> None:
    done = CliRunner().invoke(cli, ["inspect", str(bundle.path), "--json"])
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert document["device"] == dict(bundle.device)
    memory = document["memory"]
    assert (memory["of"], memory["unknown"]) == ("gpu", [])
    assert memory["total"] > sum((place(bundle, c) / "engine.plan").stat().st_size for c in bundle.engines)
    assert "NVIDIA L40S" not in done.stdout


def test_inspect_says_why_it_does_not(bundle: toolchain.Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_GPU", "NVIDIA L40S")
    monkeypatch.setenv("FAKE_CUDA_CC", "8.9")
    done = CliRunner().invoke(cli, ["inspect", str(bundle.path)])
    assert "built on NVIDIA H200" in done.output
    assert "this machine has NVIDIA L40S" in done.output


def test_a_second_build_is_all_hits(
    bundle: toolchain.Bundle, own_store: Path, tiny_model: Path, tmp_path: Path
) -> None:
    assert misses(toolchain.plan_build(recipe(tmp_path), str(tiny_model), store=own_store)) == []


def test_another_backend_exports_nothing_anew(
    bundle: toolchain.Bundle, own_store: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, old='"tensorrt"', new='"onnxruntime"')
    path.write_text(path.read_text().replace('dtype = "bfloat16"', 'dtype = "float16"'))  # its kernels lack bfloat16
    found = misses(toolchain.plan_build(path, str(tiny_model), store=own_store))
    assert [name for name in found if name.startswith("graph")] == ["graph tiny vae_decoder 1x64x64"]
    assert "weights tiny denoiser" in found  # which each backend wants turned its own way


def test_how_it_is_run_rebuilds_nothing(
    bundle: toolchain.Bundle, own_store: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, new='[tensorrt]\ncuda_graph = "off"\n')
    assert misses(toolchain.plan_build(path, str(tiny_model), store=own_store)) == []


def test_how_it_is_built_rebuilds_the_engines(
    bundle: toolchain.Bundle, own_store: Path, tiny_model: Path, tmp_path: Path
) -> None:
    path = recipe(tmp_path, new="[tensorrt]\nbuilder_optimization_level = 4\n")
    plan = toolchain.plan_build(path, str(tiny_model), store=own_store)
    assert misses(plan) == ENGINES
    assert plan.step(FIRST).reasons == ("options.builder_optimization_level: 3 -> 4",)


def test_another_gpu_rebuilds_the_engines(
    bundle: toolchain.Bundle, own_store: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_GPU", "NVIDIA L40S")
    plan = toolchain.plan_build(recipe(tmp_path), str(tiny_model), store=own_store)
    assert misses(plan) == ENGINES
    assert plan.step(FIRST).reasons == ('device.name: "NVIDIA H200" -> "NVIDIA L40S"',)


def test_options_that_cannot_be_had_are_refused_before_any_work(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules["tensorrt"], "__version__", "11.0.0.114")
    path = recipe(tmp_path, new='[tensorrt]\nbuild_route = "-a=1"\n')
    with pytest.raises(RecipeError, match=r"tensorrt\.build_route: TensorRT 11\.0\.0\.114 has no build routes"):
        toolchain.build(path, str(tiny_model), tmp_path / "bundle", store=tmp_path / "store")
    assert not (tmp_path / "store").exists()


def test_without_a_gpu_graphs_are_exported_and_engines_are_refused(
    tiny_model: Path, tmp_path: Path, own_store: Path, bundle: toolchain.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", "no_device")
    graphs = toolchain.export_graphs(recipe(tmp_path), str(tiny_model), tmp_path / "graphs", store=own_store)
    assert len(graphs) == 3
    with pytest.raises(EngineError, match="no NVIDIA GPU can be used"):
        toolchain.build(recipe(tmp_path), str(tiny_model), tmp_path / "bundle", store=own_store)


def test_what_fails_while_it_is_opened_leaves_nothing_on_the_gpu(
    bundle: toolchain.Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever allocation or binding it is that fails."""
    from cuda.bindings import runtime

    from toolchain.cuda.memory import DeviceMemory
    from toolchain.engines.tensorrt.engine import TensorRtEngine
    from toolchain.engines.tensorrt.open_plan import OpenPlan

    for owner, name in ((DeviceMemory, "_allocate"), (TensorRtEngine, "bind"), (OpenPlan, "_deserialize")):
        plain = getattr(owner, name)
        for failing in itertools.count():
            calls = itertools.count()

            def call(*args: Any, plain: Any = plain, calls: Any = calls, failing: int = failing) -> Any:
                if next(calls) == failing:
                    raise EngineError("the GPU's memory is too small")
                return plain(*args)

            with monkeypatch.context() as patch:
                patch.setattr(owner, name, call)
                try:
                    toolchain.load(bundle.path).close()
                except EngineError:
                    assert runtime._live() == [], f"{name} {failing}"
                else:
                    break
        assert failing >= len(ENGINES)


def command(tmp_path: Path, tiny_model: Path, store: Path, *more: str) -> list[str]:
    path = recipe(tmp_path, new="[tensorrt]\nmax_aux_streams = 1\n")  # other engines than those of the fixture
    arguments = ["build", str(path), "--model", str(tiny_model), "--store", str(store), "-o", str(tmp_path / "bundle")]
    code = (
        "from toolchain.engines.tensorrt import builder_process as b; b.GRACE_S = 0.5; "
        "from toolchain.cli.main import main; main()"
    )
    return [sys.executable, "-c", code, *arguments, *more]


def test_the_command_line_ends_with_1_and_no_traceback(
    bundle: toolchain.Bundle, own_store: Path, tiny_model: Path, tmp_path: Path
) -> None:
    env = {**os.environ, "FAKE_TENSORRT_FAIL": "kill_child"}
    asked = command(tmp_path, tiny_model, own_store)
    done = subprocess.run(asked, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "engine text_encoder any: TensorRT's builder was killed" in done.stderr
    assert "Traceback" not in done.stderr
    assert is_sound(own_store)
    assert not (tmp_path / "bundle").exists()


def test_ctrl_c_ends_with_130_and_a_whole_store(
    bundle: toolchain.Bundle, own_store: Path, tiny_model: Path, tmp_path: Path
) -> None:
    env = {**os.environ, "FAKE_TENSORRT_FAIL": "hang"}
    asked = command(tmp_path, tiny_model, own_store)
    running = subprocess.Popen(asked, env=env, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    while not any((own_store / ".tmp").glob("*/tmp*")):  # the builder's scratch folder
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.05)
    running.send_signal(signal.SIGINT)
    _, said = running.communicate(timeout=60)
    assert running.returncode == 130, said
    assert "Traceback" not in said
    assert is_sound(own_store)
    assert not (tmp_path / "bundle").exists()
