"""The forecast of memory: how it is put together, and what `inspect` and `plan` say of it.

That it is right is held by tests/examples/test_bundled_model.py, on a model that is large enough to be measured.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import toolchain
from tests.manifests import edit_manifest
from toolchain.builder.forecast import planned
from toolchain.builder.plan import Plan
from toolchain.bundle.forecast import OPENVINO_BYTES, RUNTIME_BYTES, TOKENIZER_TIMES, EngineMemory, Forecast, forecast
from toolchain.cli.main import cli
from toolchain.store.artifacts import Store

TEXT = EngineMemory("text_encoder", "any", 100, 10, 1, activations=20, arena=44, built=True, source="t")
SMALL = EngineMemory("denoiser", "1x64x64", 1000, 100, 2, activations=200, arena=440, built=True, source="s")
LARGE = EngineMemory("denoiser", "2x64x96", 1000, 100, 4, activations=600, arena=1320, built=True, source="l")
ENGINES = (TEXT, SMALL, LARGE)


def run(*arguments: str | Path) -> str:
    done = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_process_keeps_everything_of_every_engine() -> None:
    found = Forecast(ENGINES, (), on_gpu=False, runtime=7)
    assert found.total == 7 + (100 + 10 + 1 + 44) + (1000 + 100 + 2 + 440) + (1000 + 100 + 4 + 1320)
    assert found.to_json()["total"] == found.total


def test_an_engine_that_only_warmed_up_has_no_block_for_all_of_its_activations() -> None:
    found = Forecast(ENGINES, (), on_gpu=False, runtime=0)
    assert found.total is not None
    assert found.after({e.name for e in ENGINES}) == found.total
    assert found.after({"text_encoder", "denoiser 1x64x64"}) == found.total - 600


def test_on_a_gpu_the_largest_activations_serve_all() -> None:
    engines = tuple(replace(e, session=0, arena=0) for e in ENGINES)
    assert Forecast(engines, (), on_gpu=True, runtime=0).total == 101 + 1002 + 1004 + 600


def test_buckets_of_one_engine_share_its_weights() -> None:
    small, large = (replace(e, source="engines/denoiser/profiles", arena=0) for e in (SMALL, LARGE))
    found = Forecast((small, large), (), on_gpu=True, runtime=0)
    assert found.total == 1000 + (100 + 2) + (100 + 4) + 600
    assert found.after({large.name}) == 1000 + 100 + 4 + 600
    assert found.after({small.name}) == 1000 + 100 + 2 + 200


def test_a_sum_with_a_gap_is_none() -> None:
    found = Forecast(ENGINES, ("vae_decoder 1x64x64",), on_gpu=False, runtime=0)
    assert found.total is None
    assert found.after(set()) is None


def test_of_a_bundle(tiny_bundle: Path) -> None:
    """Each engine with what its builder wrote down; its buffers are those of its signature."""
    bundle = toolchain.read_bundle(tiny_bundle)
    found = forecast(bundle)
    parts = ("denoiser", "vae_decoder", "vae_encoder")
    names = ["text_encoder", *(f"{part} {b}" for part in parts for b in bundle.buckets)]
    assert [e.name for e in found.engines] == names
    assert found.unknown == ()  # every operator that ONNX Runtime's optimiser leaves without a shape has a rule
    decoder = found.engines[names.index("vae_decoder 2x64x96")]
    # Latents of 8 x 12 in 4 channels; pixels as bytes and as floats.
    assert decoder.buffers == 2 * (4 * 8 * 12 * 4 + 3 * 64 * 96 * (1 + 4))
    facts = json.loads(
        (tiny_bundle / bundle.engine("vae_decoder", bundle.buckets[1]).folder / "engine.json").read_text()
    )
    assert decoder.weights == facts["mapped_bytes"]
    assert decoder.session == facts["packed_bytes"] + facts["session_bytes"]
    assert (decoder.activations, decoder.arena) == (facts["activation_bytes"], facts["arena_bytes"])
    assert decoder.built
    words = (tiny_bundle / bundle.tokenizers["text_encoder"] / "tokenizer.json").stat().st_size
    assert found.runtime == RUNTIME_BYTES + TOKENIZER_TIMES * words


def test_openvinos_libraries_are_larger(openvino_bundle: Path) -> None:
    bundle = toolchain.read_bundle(openvino_bundle)
    words = (openvino_bundle / bundle.tokenizers["text_encoder"] / "tokenizer.json").stat().st_size
    assert forecast(bundle).runtime == RUNTIME_BYTES + OPENVINO_BYTES + TOKENIZER_TIMES * words


def test_inspect_tells_it(tiny_bundle: Path) -> None:
    found = forecast(toolchain.read_bundle(tiny_bundle))
    assert json.loads(run("inspect", tiny_bundle, "--json"))["memory"] == found.to_json()
    text = run("inspect", tiny_bundle)
    assert found.total is not None
    assert f"memory forecast: {found.total / 1e6:.1f} MB once every bucket has drawn" in text
    assert all(f"\n  {e.name} " in text for e in found.engines)


@pytest.mark.parametrize("damaged", [None, "", "[1, 2]", '{"activation_bytes": "many", "mapped_bytes": null}'])
def test_a_bundle_that_says_nothing_of_it_is_inspected_all_the_same(bundle_copy: Path, damaged: str | None) -> None:
    """Such as one that was built before, or by a backend that cannot tell."""
    for file in bundle_copy.rglob("engine.json"):
        if damaged is None:
            name = file.relative_to(bundle_copy).as_posix()
            edit_manifest(bundle_copy, lambda manifest, name=name: manifest["files"].pop(name))
            file.unlink()
        else:
            file.write_text(damaged)
    found = json.loads(run("inspect", bundle_copy, "--json"))["memory"]
    assert (found["engines"], found["total"], len(found["unknown"])) == ([], None, 7)
    text = run("inspect", bundle_copy)
    assert "memory forecast: none, as nothing is recorded for text_encoder, denoiser 1x64x64," in text
    assert text.endswith("vae_encoder 2x64x96\n")


@pytest.mark.parametrize("stripped", [False, True])
def test_of_a_bundle_for_tensorrt(bundle_copy: Path, stripped: bool) -> None:
    """A plan holds its weights; a stripped one is filled from the component's file."""
    for number, file in enumerate(sorted(bundle_copy.rglob("engine.json"))):
        file.write_text(json.dumps({"plan_bytes": 1000, "activation_bytes": 10 * number, "stripped": stripped}))
    bundle = replace(toolchain.read_bundle(bundle_copy), backend="tensorrt", device={"kind": "cuda"})
    found = forecast(bundle)
    files = {
        e.name: sum(f.stat().st_size for f in bundle_copy.glob(f"engines/{e.component}/*.*")) for e in found.engines
    }
    assert all(e.weights == 1000 + stripped * files[e.name] > 0 for e in found.engines)
    assert (found.on_gpu, found.runtime, found.unknown) == (True, 0, ())
    assert found.total == sum(e.weights + e.buffers for e in found.engines) + 60


@pytest.fixture
def plan_of(tiny_model: Path, tiny_recipe: Path, tiny_bundle: Path) -> Callable[[Path], Plan]:
    return lambda store: toolchain.plan_build(tiny_recipe, str(tiny_model), store=store)


def test_plan_says_nothing_of_what_is_not_there(plan_of: Any, tmp_path: Path) -> None:
    assert planned(plan_of(tmp_path / "empty")) == []


def test_plan_tells_what_is_built(plan_of: Any, tiny_bundle: Path, store: Path) -> None:
    assert planned(plan_of(store)) == list(forecast(toolchain.read_bundle(tiny_bundle)).engines)


def test_plan_tells_what_is_exported(
    plan_of: Any, store: Path, tmp_path: Path, tiny_recipe: Path, tiny_model: Path
) -> None:
    """Weights and activations of the graph as it is, where the store has no engine yet."""
    own = tmp_path / "store"
    for graph in [a for a in Store(store).artifacts() if a.stage == "graph"]:
        shutil.copytree(graph.path, own / "graph" / graph.key)
    found = planned(plan_of(own))
    assert [e.name for e in found][:2] == ["text_encoder", "denoiser 1x64x64"]
    assert not any(e.built or e.session or e.arena for e in found)
    small, large = (next(e for e in found if e.name == f"denoiser {b}") for b in ("1x64x64", "2x64x96"))
    assert small.weights == large.weights > 1_000_000
    assert small.activations is not None
    assert large.activations is not None
    assert 2.5 < large.activations / small.activations < 4  # three times the pixels
    arguments = ["plan", tiny_recipe, "--model", tiny_model, "--store", own]
    assert json.loads(run(*arguments, "--json"))["memory"] == [e.to_json() for e in found]
    assert "\n  denoiser 1x64x64, exported " in run(*arguments)
