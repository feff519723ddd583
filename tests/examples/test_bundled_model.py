"""The shipped recipe builds the shipped model, its check passes, and what it draws is what the caption says.

It is also large enough for the forecast of memory to be held against a process.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests.openvino_here import has_bfloat16
from toolchain.bench.run import measure
from toolchain.weights.mapped import read_header

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "examples" / "shapes" / "model"
sys.path.insert(0, str(ROOT / "examples" / "shapes"))
needs_proc = pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells resident memory")


@pytest.fixture(scope="module")
def bundle(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("shapes") / "bundle"
    toolchain.build(ROOT / "recipes" / "shapes-fp32.toml", str(MODEL), output, store=store)
    return output


def test_the_check_passes(bundle: Path) -> None:
    report = toolchain.check_bundle(bundle, str(MODEL))
    assert report.passed, "\n".join(report.lines())
    assert min(p.psnr_db for p in report.pictures) >= 60


def test_the_gate_passes_with_weights_in_int8(bundle: Path, store: Path, tmp_path: Path) -> None:
    """Every component within the recipe's limits, at less than a quarter of the size; and it says what a step costs."""
    recipe = ROOT / "recipes" / "shapes-int8w.toml"
    small = toolchain.build(recipe, str(MODEL), tmp_path / "bundle", store=store)
    assert small.gate is not None
    assert small.gate["state"] == "passed"
    assert small.gate["pictures"]["psnr_db"]["min"] >= 48
    assert small.gate["step_time"]["saved_bytes"] > 15e6
    assert sum(file.size for file in small.files.values()) < 12e6


def test_the_gate_passes_with_activations_in_int8(store: Path, tmp_path: Path) -> None:
    """The tuned recipe, calibrated anew: nearly all of the work in int8, and pictures like those of its header."""
    recipe = ROOT / "recipes" / "shapes-int8.toml"
    small = toolchain.build(recipe, str(MODEL), tmp_path / "bundle", store=store)
    assert small.gate is not None
    assert small.gate["state"] == "passed"
    assert small.gate["pictures"]["psnr_db"]["median"] >= 36
    assert small.gate["pictures"]["psnr_db"]["min"] >= 28


def test_the_check_passes_in_float16(store: Path, tmp_path: Path) -> None:
    recipe = ROOT / "recipes" / "shapes-fp16.toml"
    small = toolchain.build(recipe, str(MODEL), tmp_path / "bundle", store=store)
    report = toolchain.check_bundle(small.path, str(MODEL))
    assert report.passed, "\n".join(report.lines())
    assert min(p.psnr_db for p in report.pictures) >= 60
    assert sum(file.size for file in small.files.values()) < 18e6


@pytest.fixture(scope="module")
def int4(store: Path, tmp_path_factory: pytest.TempPathFactory) -> toolchain.Bundle:
    output = tmp_path_factory.mktemp("shapes-int4") / "bundle"
    return toolchain.build(ROOT / "recipes" / "shapes-int4.toml", str(MODEL), output, store=store)


def test_the_gate_passes_with_linear_layers_in_int4(int4: toolchain.Bundle) -> None:
    assert int4.gate is not None
    assert int4.gate["state"] == "passed"
    assert int4.gate["pictures"]["psnr_db"]["median"] >= 36


def test_linear_layers_in_int4_are_small(int4: toolchain.Bundle) -> None:
    """Blocks and their scales, against the float32 that they stand for: at most 0.18."""
    for component in ("text_encoder", "denoiser"):
        entry = int4.engine(component, int4.buckets[0])
        tensors = read_header(int4.path / entry.weights["weights"])
        blocks = {name.removesuffix(".uint4"): ref.nbytes for name, ref in tensors.items() if name.endswith(".uint4")}
        assert len(blocks) >= 18
        nbytes = sum(blocks.values()) + sum(tensors[f"{name}.scales"].nbytes for name in blocks)
        assert nbytes <= 0.18 * 4 * 2 * sum(blocks.values())


@pytest.fixture(scope="module")
def short(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_bfloat16():
        pytest.skip("this CPU has no bfloat16")
    output = tmp_path_factory.mktemp("shapes-bf16") / "bundle"
    toolchain.build(ROOT / "recipes" / "shapes-bf16-cpu.toml", str(MODEL), output, store=store)
    return output


def test_the_check_passes_in_bfloat16(short: Path) -> None:
    report = toolchain.check_bundle(short, str(MODEL))
    assert report.passed, "\n".join(report.lines())
    assert min(p.psnr_db for p in report.pictures) >= 44  # 48.7
    assert sum(file.size for file in toolchain.read_bundle(short).files.values()) < 20e6


@needs_proc
@pytest.mark.parametrize("batch", [1, 4])
def test_memory_is_what_was_forecast(bundle: Path, int4: toolchain.Bundle, batch: int) -> None:
    """By how much a process grows that opens the bundle and draws; not all of it are engines."""
    for path in (bundle, int4.path):
        found = measure(path, repeats=1, batch=batch)
        assert found.contenders["diffbuild"].grown_mb == pytest.approx(found.forecast_mb, rel=0.15)
        assert found.memory is not None


@needs_proc
@pytest.mark.parametrize("batch", [1, 4])
def test_memory_with_openvino_is_what_was_forecast(short: Path, batch: int) -> None:
    found = measure(short, repeats=1, batch=batch)
    assert found.contenders["diffbuild"].grown_mb == pytest.approx(found.forecast_mb, rel=0.15)


@pytest.fixture(scope="module")
def scores(bundle: Path) -> list[Any]:
    """A tenth of the evaluation: the score itself is in benchmarks/results."""
    import evaluate
    import scenes

    chosen = evaluate.held_out_scenes()[::10]
    pictures = evaluate.draw_with_bundle(bundle)([s.caption for s in chosen], list(range(len(chosen))))
    return [scenes.score(s, p) for s, p in zip(chosen, pictures, strict=True)]


def test_held_out_captions_are_drawn(scores: list[Any]) -> None:
    """With room for luck, as twenty captions are few."""
    assert np.mean([s.colours and s.background for s in scores]) >= 0.8


def test_every_thing_is_where_the_caption_says(scores: list[Any]) -> None:
    assert np.mean([s.everything for s in scores]) >= 0.8


def test_the_model_is_small_and_safe() -> None:
    files = [f for f in MODEL.rglob("*") if f.is_file()]
    assert sum(f.stat().st_size for f in files) <= 16e6
    assert {f.suffix for f in files} <= {".json", ".safetensors", ".txt"}
