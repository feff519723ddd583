"""Whole comparisons on the tiny bundle: a good one passes, and every kind of damage fails where it lies.

The damaged files are signed again in the manifest: these are bundles that load without complaint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests.manifests import edit_manifest
from toolchain.bundle.bundle import Bundle, read_bundle
from toolchain.check.compare import compare
from toolchain.check.feeds import RECORDED, _recorded
from toolchain.check.page import render
from toolchain.check.report import CheckReport
from toolchain.check.tables import compare_tables
from toolchain.errors import BundleError, DiffbuildError, ModelError
from toolchain.models.hub import resolve_model
from toolchain.models.source import ModelSource
from toolchain.sampler.table import SamplerTable
from toolchain.weights.mapped import read_header

BUCKET = "1x64x64"
PROMPT = "a red circle on a white background"


def run(bundle: Path, model: Path) -> CheckReport:
    return compare(read_bundle(bundle), resolve_model(str(model)))


def resign(bundle: Path, *changed: Path, edit: Callable[[dict[str, Any]], None] = lambda manifest: None) -> None:
    """Writes size and sha256 of changed files into the manifest, after `edit` has changed it."""

    def change(manifest: dict[str, Any]) -> None:
        edit(manifest)
        for path in changed:
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            manifest["files"][path.relative_to(bundle).as_posix()] = {"sha256": digest, "size": path.stat().st_size}

    edit_manifest(bundle, change)


def edit_tensor(path: Path, key: str, change: Callable[[np.ndarray], Any]) -> None:
    ref = read_header(path)[key]
    assert ref.dtype == "F32"
    data = bytearray(path.read_bytes())
    place = slice(ref.offset, ref.offset + ref.nbytes)
    data[place] = np.asarray(change(np.frombuffer(data[place], np.float32).copy()), np.float32).tobytes()
    path.write_bytes(data)


def keep_one(manifest: dict[str, Any]) -> None:
    """One bucket, one prompt and one seed: enough to find damage, in a few seconds."""
    for engines in manifest["engines"].values():
        engines.pop("2x64x96", None)
    manifest["recipe"]["buckets"] = [BUCKET]
    manifest["recipe"]["check"] |= {"prompts": [PROMPT], "seeds": [0]}


@pytest.fixture
def small(bundle_copy: Path) -> Path:
    resign(bundle_copy, edit=keep_one)
    return bundle_copy


def largest(bundle: Path, component: str) -> tuple[Path, str]:
    """The largest weight that the engine reads: of those that ONNX Runtime packed where it packs any."""
    paths = [bundle / "engines" / component / f"{name}.safetensors" for name in ("packed", "weights")]
    path = next(p for p in paths if p.exists() and read_header(p))
    refs = {key: ref for key, ref in read_header(path).items() if not key.startswith("embeddings.")}
    return path, max(refs, key=lambda key: refs[key].nbytes)


def failed_components(report: CheckReport) -> set[str]:
    return {e.component for e in report.entries if not e.passed}


@pytest.fixture(scope="module")
def good(tiny_bundle: Path, tiny_model: Path) -> CheckReport:
    return run(tiny_bundle, tiny_model)


def test_a_good_bundle_passes_everywhere(good: CheckReport) -> None:
    assert good.passed, good.lines()
    assert good.warnings == ()
    assert {(e.component, e.bucket) for e in good.entries} == {
        ("sampler", "any"),
        ("text_encoder", "any"),
        *((c, b) for c in ("denoiser", "vae_decoder", "vae_encoder") for b in (BUCKET, "2x64x96")),
    }
    # 2 prompts, 2 seeds, 2 sizes
    assert [p.size for p in good.pictures] == ["64x64"] * 4 + ["64x96"] * 4
    assert good.worst_first()[0].margin_db > 20


def test_every_metric_and_input_is_in_the_report(good: CheckReport) -> None:
    data = json.loads(json.dumps(good.to_json(), allow_nan=False))
    for entry in data["entries"]:
        expected = {"cosine", "snr_db", "max_error"}
        if entry["output"] in ("next_step", "pixels"):
            expected = {"difference"}
        elif entry["component"] == "sampler":
            expected = {"max_error"}
        assert set(entry["metrics"]) == set(entry["limits"]) == expected
    inputs = {(e["bucket"], e["input"]) for e in data["entries"] if e["component"] == "denoiser"}
    assert inputs == {
        *((BUCKET, f"prompt {p}, evaluation {i} of 4") for p in (1, 2) for i in (1, 2, 3, 4)),
        *(("2x64x96", f"prompts 1-2, evaluation {i} of 4") for i in (1, 2, 3, 4)),
    }
    assert all(f"evaluation {e['evaluation']} of" in e["input"] for e in data["entries"] if e["evaluation"])
    assert {e["component"] for e in data["entries"] if e["evaluation"]} == {"denoiser"}
    assert {e["input"] for e in data["entries"] if e["component"] == "sampler"} == {"model/4", "euler/4", "euler-a/4"}
    assert {e["input"] for e in data["entries"] if e["component"] == "text_encoder"} == {
        "prompt 1",
        "prompt 2",
        "empty prompt",
    }
    assert {"torch", "diffusers", "polygraphy", "scikit-image", "diffbuild"} <= set(data["versions"])


@pytest.mark.parametrize("evaluations", [1, 2, 4, 7, 8, 20, 25, 30, 50, 999])
def test_recorded_evaluations_are_spread_over_the_trajectory(evaluations: int) -> None:
    chosen = sorted(_recorded(evaluations))
    assert {0, evaluations // 2, evaluations - 1} <= {*chosen}
    assert len(chosen) == min(evaluations, RECORDED)
    gaps = np.diff(chosen)
    assert evaluations == 1 or gaps.max() - gaps.min() <= 1


def test_the_report_carries_the_pixels_of_both_sides_for_the_page(good: CheckReport, tiny_bundle: Path) -> None:
    for picture in good.pictures:
        assert picture.pixels is not None
        height, width = map(int, picture.size.split("x"))
        assert picture.pixels.reference.shape == picture.pixels.compiled.shape == (height, width, 3)
    bundle = read_bundle(tiny_bundle)
    page = render(good, bundle)
    assert f"all {len(good.entries) + 8} gates kept" in page
    assert page.count("<img") == 3 * 8
    assert all(entry.sha256 in page and name in page for name, entry in bundle.files.items())


def test_the_public_function_runs_the_check(
    tiny_bundle: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[Path, str]] = []

    def fake(bundle: Bundle, source: ModelSource, **_: Any) -> None:
        seen.append((bundle.path, source.name))

    monkeypatch.setattr("toolchain.check.compare.compare", fake)
    toolchain.check_bundle(tiny_bundle, str(tiny_model))
    assert seen == [(tiny_bundle, str(tiny_model))]


def flip_sign(values: np.ndarray) -> np.ndarray:
    return -values


def scale_largest(values: np.ndarray) -> np.ndarray:
    values[np.abs(values).argmax()] *= 8  # what three flipped bits of an exponent do to one value
    return values


@pytest.mark.parametrize(
    ("component", "change"), [("text_encoder", flip_sign), ("denoiser", flip_sign), ("vae_decoder", scale_largest)]
)
def test_a_damaged_weight_fails_its_component_alone(
    small: Path, tiny_model: Path, component: str, change: Callable[[np.ndarray], np.ndarray]
) -> None:
    path, key = largest(small, component)
    edit_tensor(path, key, change)
    resign(small, path)
    report = run(small, tiny_model)
    assert failed_components(report) == {component}
    assert report.worst_first()[0].component == component
    assert not any(p.passed for p in report.pictures)


def test_weights_of_nan_fail_as_not_finite_and_nothing_is_printed(
    small: Path, tiny_model: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = small / "engines" / "denoiser" / "weights.safetensors"
    edit_tensor(path, "time_embedding.linear_1.bias", lambda values: values * np.nan)
    resign(small, path)
    capfd.readouterr()
    report = run(small, tiny_model)
    assert capfd.readouterr() == ("", "")
    assert all("finite" in e.failed for e in report.entries if e.output == "next_state")
    assert all("finite" in p.failed for p in report.pictures)
    assert report.worst_first()[0].output == "next_state"
    json.dumps(report.to_json(), allow_nan=False)


def test_a_blank_picture_fails_by_name(small: Path, tiny_model: Path) -> None:
    for path in (small / "engines" / "vae_decoder").glob("*.safetensors"):
        for key, ref in read_header(path).items():
            if len(ref.shape) == 4:  # without convolutions nothing varies over the picture
                edit_tensor(path, key, np.zeros_like)
        resign(small, path)
    report = run(small, tiny_model)
    assert failed_components(report) == {"vae_decoder"}
    assert all("not blank" in p.failed for p in report.pictures), report.lines()


def test_a_swapped_engine_fails(small: Path, tiny_model: Path, tiny_recipe: Path, store: Path, tmp_path: Path) -> None:
    from tests.tiny import make_sd

    recipe = tmp_path / "one.toml"
    recipe.write_text(tiny_recipe.read_text().replace(', "2x64x96"', ""))
    other = make_sd(tmp_path / "other", seed=1)
    toolchain.build(recipe, str(other), tmp_path / "second", store=store)
    shutil.copytree(tmp_path / "second/engines/denoiser", small / "engines/denoiser", dirs_exist_ok=True)
    resign(small, *(p for p in (small / "engines/denoiser").rglob("*") if p.is_file()))
    report = run(small, tiny_model)
    assert report.warnings == ()
    assert failed_components(report) == {"denoiser"}
    assert not any(p.passed for p in report.pictures)


def test_another_model_is_warned_of_and_fails(small: Path, tmp_path: Path) -> None:
    from tests.tiny import make_sd

    report = run(small, make_sd(tmp_path / "other", seed=1))
    assert report.warnings == tuple(
        f"the {name}'s weights are not those that the bundle was built from"
        for name in ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")
    )
    assert failed_components(report) == {"text_encoder", "denoiser", "vae_decoder", "vae_encoder"}


def test_a_wrong_table_entry_fails_by_name(small: Path, tiny_model: Path) -> None:
    path = small / "samplers" / "euler.json"
    table = SamplerTable.from_json(json.loads(path.read_text())["euler/4"])
    table.rows[2, 16] *= 1.05
    path.write_text(json.dumps({"euler/4": table.to_json()}))
    resign(small, path)
    report = run(small, tiny_model)
    assert [(e.component, e.input) for e in report.entries if not e.passed] == [("sampler", "euler/4")]
    assert not any(p.passed for p in report.pictures)


@pytest.mark.parametrize("change", ["sigma", "evaluations", "noise", "another scheduler"])
def test_every_table_is_compared_also_those_that_no_picture_uses(
    bundle_copy: Path, tiny_model: Path, change: str
) -> None:
    path = bundle_copy / "samplers" / "model.json"
    table = SamplerTable.from_json(json.loads(path.read_text())["model/4"])
    changes: dict[str, Any] = {
        "sigma": {"init_noise_sigma": table.init_noise_sigma * 1.05},
        "evaluations": {name: getattr(table, name)[:-1] for name in ("rows", "timesteps", "noise_draws")},
        "noise": {"noise_draws": (0, 1, *table.noise_draws[2:])},
    }
    if change in changes:
        table = replace(table, **changes[change])
    else:
        table = SamplerTable.from_json(json.loads((bundle_copy / "samplers" / "euler.json").read_text())["euler/4"])
    path.write_text(json.dumps({"model/4": table.to_json()}))
    config = json.loads((tiny_model / "scheduler/scheduler_config.json").read_text())
    entries = compare_tables(read_bundle(bundle_copy), config)
    assert [e.input for e in entries if not e.passed] == ["model/4"]


def test_tables_for_another_prediction_type_fail(small: Path, tiny_model: Path) -> None:
    from toolchain.sampler.compile import compile_table

    config = json.loads((tiny_model / "scheduler/scheduler_config.json").read_text())
    config["prediction_type"] = "v_prediction"
    paths = []
    for name in ("model", "euler", "euler-a"):
        paths.append(small / "samplers" / f"{name}.json")
        paths[-1].write_text(json.dumps({f"{name}/4": compile_table(name, 4, config).to_json()}))
    resign(small, *paths, edit=lambda manifest: manifest["settings"].update(scheduler=config))
    report = run(small, tiny_model)
    assert report.warnings == ("the scheduler's config is not the one that the bundle was built from",)
    assert failed_components(report) == {"sampler"}
    assert not any(p.passed for p in report.pictures)


def test_a_damaged_bundle_is_refused(small: Path, tiny_model: Path) -> None:
    path = small / "engines" / "denoiser" / "packed.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match=r"packed\.safetensors"):
        run(small, tiny_model)


def test_a_model_of_other_shapes_is_refused(small: Path, tiny_copy: Path) -> None:
    for file, key in (
        ("text_encoder/config.json", "max_position_embeddings"),
        ("tokenizer/tokenizer_config.json", None),
    ):
        path = tiny_copy / file
        path.write_text(json.dumps(json.loads(path.read_text()) | {key or "model_max_length": 20}))
    with pytest.raises(ModelError, match="text_encoder has other shapes"):
        run(small, tiny_copy)


def test_a_missing_package_is_named(small: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    with pytest.raises(DiffbuildError, match=r"polygraphy(.|\n)*pip install 'diffbuild\[build\]'"):
        run(small, tiny_model)
