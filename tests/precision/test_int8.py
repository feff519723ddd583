"""Builds in int8 from recipe to picture: ranges, keys, what is refused, and which operators are run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from safetensors.numpy import load_file, save_file

import toolchain
from tests.engines.test_onnxruntime_memory import require_what_onnxruntime_does
from tests.families import MAKERS
from tests.parity import Build, least_psnr_db
from tests.precision.test_engines import PLAIN
from toolchain import api
from toolchain.cli.build import plan_lines
from toolchain.cli.inspect import bundle_json, bundle_lines
from toolchain.errors import CalibrationError, DiffbuildError, RecipeError, UsageError
from toolchain.precision.ranges import EXPECTED
from toolchain.weights.range_file import read_ranges, write_ranges

CALIBRATION = """
[calibration]
prompts = ["a red circle", "a blue square"]
"""
INT8 = """
[components.denoiser.quantize]
weights = "int8"
activations = "int8"
"""
TEXT = f'family = "sd"\n{PLAIN}{INT8}{CALIBRATION}'


def operators(bundle: toolchain.Bundle, component: str) -> list[str]:
    """What an engine runs."""
    entry = bundle.engine(component, bundle.buckets[0])
    return [node.op_type for node in ir.load(bundle.path / entry.folder / "graph.onnx").graph]


@pytest.mark.parametrize("family", MAKERS)
def test_a_family_draws_nearly_the_same_in_int8(family: str, build: Build, family_model: Callable[[str], Path]) -> None:
    """With smoothing, on a tiny model, whose random weights are harder than trained ones."""
    folder = family_model(family)
    plain = build(f"{family}-plain", folder, f'family = "{family}"\n{PLAIN}')
    text = f'family = "{family}"\n{PLAIN}{INT8}smoothing = 0.5\nscales = "mse"\n{CALIBRATION}'
    small = build(f"{family}-w8a8", folder, text)
    pictures = [pipe(["a red circle"] * 2, seed=[0, 1]).images for pipe in (plain, small)]
    psnr = least_psnr_db(*pictures)  # type: ignore[arg-type]
    assert 30 <= psnr < 90, psnr
    inspection = api.inspect_bundle(small.bundle.path)
    facts = bundle_json(inspection)["quantized"]["denoiser"]
    assert facts["inputs"] == facts["weights"] > 5
    assert operators(small.bundle, "denoiser").count("MatMulIntegerToFloat") == facts["weights"]
    said = f"denoiser: {facts['weights']} of {facts['of']} weights and their inputs in int8"
    assert any(line.startswith(said) for line in bundle_lines(inspection))


@pytest.mark.parametrize("family", ["sd", "flux"])
def test_a_family_draws_nearly_the_same_in_float8(
    family: str, build: Build, family_model: Callable[[str], Path]
) -> None:
    """ONNX Runtime rounds as a GPU would and computes in float32."""
    folder = family_model(family)
    plain = build(f"{family}-plain", folder, f'family = "{family}"\n{PLAIN}')
    pictures = [plain(["a red circle"] * 2, seed=[0, 1]).images]
    for activations in ("none", "float8"):
        table = f'[components.denoiser.quantize]\nweights = "float8"\nactivations = "{activations}"\n'
        small = build(f"{family}-{activations}", folder, f'family = "{family}"\n{PLAIN}{table}{CALIBRATION}')
        pictures.append(small(["a red circle"] * 2, seed=[0, 1]).images)
    assert bundle_json(api.inspect_bundle(small.bundle.path))["quantized"]["denoiser"]["inputs"] > 5
    assert "QuantizeLinear" in operators(small.bundle, "denoiser")
    weights, both = (least_psnr_db(pictures[0], other) for other in pictures[1:])  # type: ignore[arg-type]
    assert 25 <= both < weights < 60, (weights, both)


@pytest.fixture(scope="module")
def bundle(tiny_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> toolchain.Bundle:
    """The recipe of TEXT, built in the shared store."""
    folder = tmp_path_factory.mktemp("built")
    (folder / "tiny-int8.toml").write_text(TEXT)
    return toolchain.build(folder / "tiny-int8.toml", str(tiny_model), folder / "bundle", store=store, gate=False)


def test_the_memory_of_its_engine_is_known(bundle: toolchain.Bundle, tmp_path: Path) -> None:
    require_what_onnxruntime_does(bundle, "denoiser", tmp_path)


@pytest.fixture(scope="module")
def planned(bundle: toolchain.Bundle, tiny_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Plans a recipe in the store where `bundle` is built."""
    folder = tmp_path_factory.mktemp("int8")

    def plan(text: str, **options: Any) -> Any:
        path = folder / "tiny-int8.toml"
        path.write_text(text)
        return api.plan_build(path, tiny_model, store=store, gate=False, **options)

    return plan


def misses(plan: Any) -> list[str]:
    return [str(step.id) for step in plan.steps if not step.hit]


def test_a_second_build_has_nothing_to_do(planned: Any) -> None:
    assert misses(planned(TEXT)) == []


@pytest.mark.parametrize("change", ['ranges = "percentile=99.9"', "smoothing = 0.5", 'exclude = ["mid_block"]'])
def test_what_ranges_are_made_into_draws_nothing_again(planned: Any, change: str) -> None:
    plan = planned(TEXT.replace(INT8, f"{INT8}{change}\n"))
    assert [name.split()[0] for name in misses(plan)] == ["weights", "packed", "engine"]


def test_other_pictures_are_another_calibration(planned: Any) -> None:
    plan = planned(TEXT.replace("a blue square", "a blue ring"))
    assert [name.split()[0] for name in misses(plan)] == ["calibration", "weights", "packed", "engine"]


def test_a_file_stands_for_a_calibration(planned: Any, tiny_model: Path, store: Path, tmp_path: Path) -> None:
    """Also where the recipe has no table; and the weights are the same, bit for bit."""
    recipe = tmp_path / "tiny-int8.toml"
    recipe.write_text(TEXT)
    ranges = api.calibrate(recipe, tiny_model, tmp_path / "ranges.safetensors", store=store)
    recipe.write_text(TEXT.replace(CALIBRATION, ""))
    bundles = [
        toolchain.build(recipe, str(tiny_model), tmp_path / name, store=store, calibration=file, gate=False)
        for name, file in (("file", ranges.path), ("again", str(ranges.path)))
    ]
    entry = bundles[0].engine("denoiser", bundles[0].buckets[0])
    recipe.write_text(TEXT)
    drawn = toolchain.build(recipe, str(tiny_model), tmp_path / "drawn", store=store, gate=False)
    for file in entry.weights.values():
        assert bundles[0].files[file] == drawn.files[file] == bundles[1].files[file]
    drawn_with = ranges.about["model"]  # the name that it had when the ranges were drawn
    assert bundles[0].model["ranges"]["model"] == drawn_with
    said = f"drawn with {drawn_with} (2 pictures, 2 steps, model, onnxruntime)"
    assert any(said in line for line in bundle_lines(api.inspect_bundle(bundles[0].path)))
    assert "ranges" not in drawn.model
    plan = planned(TEXT.replace(CALIBRATION, ""), calibration=ranges.path)
    assert any(said in line for line in plan_lines(plan))
    assert not any(step.stage == "calibration" for step in plan.steps)


def test_ranges_of_another_model_are_refused(planned: Any, tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    write_ranges(file, {"denoiser": {}}, {"model": "other", "configs": {"denoiser": "0"}})
    with pytest.raises(CalibrationError, match="another model"):
        planned(TEXT, calibration=file)
    assert read_ranges(file).components == {"denoiser": {}}


BAD = [
    (TEXT.replace(CALIBRATION, ""), RecipeError, "the recipe says nothing of what to calibrate with"),
    (TEXT.replace("denoiser", "text_encoder"), RecipeError, "text_encoder.quantize.activations: no ranges are known"),
    (TEXT.replace('weights = "int8"', 'weights = "int4"'), RecipeError, 'of the same type (expected "none", weights'),
    (TEXT.replace('weights = "int8"', 'weights = "float8"'), RecipeError, 'same type (expected "float8" or "none", w'),
    (TEXT.replace('activations = "int8"', 'activations = "float8"'), RecipeError, '(expected "int8" or "none", w'),
    (TEXT.replace("denoiser", "vae_encoder"), RecipeError, "vae_encoder.quantize.activations: no ranges are known"),
    (TEXT.replace(INT8, f'{INT8}ranges = "most"\n'), RecipeError, f"ranges: unknown method (expected {EXPECTED}"),
    (TEXT.replace('activations = "int8"', "smoothing = 0.5"), RecipeError, "quantize.smoothing: needs activations"),
    (TEXT.replace('activations = "int8"', 'ranges = "mean"'), RecipeError, "quantize.ranges: needs activations"),
    (TEXT.replace(INT8, f"{INT8}smoothing = 1.5\n"), RecipeError, "expected a number from 0 to 1, got 1.5"),
    (TEXT.replace('activations = "int8"', 'activations = "int4"'), RecipeError, "expected one of 'none', 'int8'"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "kind", "message"), BAD)
def test_what_does_not_fit_is_refused_while_planning(
    planned: Any, text: str, kind: type[DiffbuildError], message: str
) -> None:
    with pytest.raises(kind) as error:
        planned(text)
    assert message in str(error.value)


def test_a_file_that_nothing_needs_is_refused(planned: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="rounds no activations"):
        planned(f'family = "sd"\n{PLAIN}', calibration=tmp_path / "ranges.safetensors")


def test_a_warning_of_the_backend_is_logged(
    planned: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("toolchain.engines.onnxruntime.build.saturates_int8", lambda: True)
    planned(TEXT)
    assert "components.denoiser.quantize: this CPU has no VNNI" in caplog.text


def test_a_schedule_that_no_scheduler_has_is_told_before_any_export(
    tiny_model: Path, store: Path, tmp_path: Path
) -> None:
    recipe, own = tmp_path / "tiny.toml", tmp_path / "store"
    recipe.write_text(TEXT.replace("[calibration]", '[calibration]\nscheduler = "ddim:spacing=leading"\nsteps = 1500'))
    with pytest.raises(DiffbuildError, match="1500"):
        toolchain.build(recipe, str(tiny_model), tmp_path / "bundle", store=own)
    assert "graph" not in {artifact.stage for artifact in api.list_artifacts(own).artifacts}
    recipe.write_text(TEXT.replace("[calibration]", '[calibration]\nscheduler = "ddim"'))
    bundle = toolchain.build(recipe, str(tiny_model), tmp_path / "bundle", store=store, gate=False)
    assert {name.split("/")[0] for name in bundle.samplers} == {"model"}  # and none that the calibration drew with


def test_ranges_of_other_weights_are_taken_with_a_warning(
    tiny_copy: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(TEXT)
    ranges = api.calibrate(recipe, tiny_copy, tmp_path / "ranges.safetensors", store=store)
    api.plan_build(recipe, tiny_copy, store=store, calibration=ranges.path)
    assert "other weights" not in caplog.text
    (file,) = (tiny_copy / "unet").glob("*.safetensors")
    tensors = {name: tensor * np.float32(1.01) for name, tensor in load_file(file).items()}
    save_file(tensors, file)
    api.plan_build(recipe, tiny_copy, store=store, calibration=ranges.path)
    assert "were drawn with other weights, of" in caplog.text
