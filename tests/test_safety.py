"""The safety checker: told where it is left out, and where it is compiled, black where diffusers' pictures are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import toolchain
from tests.parity import LEAST_PSNR_DB, PROMPTS, Build, least_psnr_db, random_images
from tests.tiny import recipe_for
from toolchain.builder.plan import check_recipe
from toolchain.bundle.bundle import read_bundle
from toolchain.check.components import _Comparison
from toolchain.check.measure import Feed
from toolchain.check.reference import reference_pipeline
from toolchain.cli.main import cli
from toolchain.engines.builders import builder_of
from toolchain.errors import ModelError, RecipeError
from toolchain.models import safety
from toolchain.models.hub import resolve_model, select_files
from toolchain.models.registry import MODELS, family_of
from toolchain.recipe import parse_recipe
from toolchain.runtime.safety import prepare
from toolchain.settings import SafetyInput

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
RECIPE = """\
family = "sd"
buckets = ["1x64x64"]
[sampling]
scheduler = "euler"
steps = 2
schedulers = ["euler"]
step_counts = [2]
[check]
prompts = ["a"]
"""
ASKED = RECIPE + "[safety]\nchecker = true\n"
SEEDS = [3, 9]
RUN = {"num_inference_steps": 2, "guidance_scale": 5.0, "height": 64, "width": 64}


def draw(model: Path) -> tuple[Any, Any]:
    """The pipeline as diffusers loads it, and its result."""
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    return pipeline, pipeline(PROMPTS, generator=generators, **RUN)


@pytest.fixture(scope="module")
def guarded(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a checker whose thresholds lie between its two pictures: one of them is flagged."""
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker
    from transformers import CLIPConfig, CLIPImageProcessor

    from toolchain.models.safety_module import SafetyChecker

    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("guarded") / "model"))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision = {**sizes, "image_size": 32, "patch_size": 16}
    config = CLIPConfig(vision_config=vision, text_config=sizes, projection_dim=8)
    torch.manual_seed(0)
    checker = StableDiffusionSafetyChecker(config)
    torch.nn.init.normal_(checker.concept_embeds)
    torch.nn.init.normal_(checker.special_care_embeds)
    checker.concept_embeds_weights.data.zero_()
    processor = CLIPImageProcessor(size={"shortest_edge": 40}, crop_size={"height": 32, "width": 32})
    _, result = draw(tiny_model)
    module = SafetyChecker(checker, "float32")
    with torch.no_grad():
        inputs = (processor(image, return_tensors="pt")["pixel_values"] for image in result.images)
        highest = [float(module(one)[0].max()) for one in inputs]
    checker.concept_embeds_weights.data.fill_(sum(highest) / 2)
    checker.save_pretrained(folder / "safety_checker")
    processor.save_pretrained(folder / "feature_extractor")
    edit_index(
        folder,
        safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"],
        feature_extractor=["transformers", "CLIPImageProcessor"],
        requires_safety_checker=True,
    )
    return folder


def edit_index(model: Path, **changes: Any) -> None:
    path = model / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def pipe(guarded: Path, build: Build) -> toolchain.Pipeline:
    return build("guarded", guarded, ASKED)


def test_what_diffusers_flags_is_black(
    pipe: toolchain.Pipeline, guarded: Path, caplog: pytest.LogCaptureFixture
) -> None:
    _, theirs = draw(guarded)
    ours = pipe(PROMPTS, seed=SEEDS, guidance=5.0)
    assert sorted(theirs.nsfw_content_detected) == [False, True]
    assert ours.flagged == theirs.nsfw_content_detected
    assert least_psnr_db(ours.images, theirs.images) >= LEAST_PSNR_DB
    assert [np.asarray(image).any() for image in ours.images] == [not flag for flag in ours.flagged]
    assert "the safety checker flagged 1 of 2 pictures" in caplog.text
    assert pipe(PROMPTS[0], seed=3, decode=False).flagged is None


def test_a_picture_is_prepared_as_transformers_prepares_it(guarded: Path) -> None:
    from transformers import CLIPImageProcessor

    processor = CLIPImageProcessor.from_pretrained(guarded / "feature_extractor")
    settings = safety.extracted(resolve_model(str(guarded)))
    assert (settings.resize, settings.crop) == (40, 32)
    for height, width in ((64, 64), (64, 96), (48, 33)):
        (image,) = random_images(1, height, width)
        expected = processor(image, return_tensors="np")["pixel_values"]
        np.testing.assert_array_equal(prepare(np.asarray(image), settings), expected)


def test_a_check_compares_the_checker_and_keeps_it_in_the_reference(pipe: toolchain.Pipeline, guarded: Path) -> None:
    bundle, source = pipe.bundle, resolve_model(str(guarded))
    comparison = _Comparison(bundle, source, MODELS["sd"], lambda text: None)
    pixels = np.stack([np.asarray(image) for image in random_images(2, 64, 64)])
    comparison.checker({bundle.buckets[0]: [Feed("picture", {"pixels": pixels})]})
    assert [e.output for e in comparison.entries] == ["scores", "flagged"] * 2
    assert all(e.passed for e in comparison.entries), [e.describe() for e in comparison.entries]
    reference, changes = reference_pipeline(source, MODELS["sd"], bundle.recipe)
    assert reference.safety_checker is not None
    assert changes == ["float32 throughout"]


def test_the_commands_tell_what_becomes_of_it(
    pipe: toolchain.Pipeline, guarded: Path, store: Path, tmp_path: Path
) -> None:
    compiled, left_out = "compiled; pictures that it flags are black", "[safety] checker = true in the recipe compiles"
    for name, text in (("asked", ASKED), ("plain", RECIPE)):
        (tmp_path / f"{name}.toml").write_text(text)
    for name, expected in (("asked", compiled), ("plain", left_out)):
        args = ["plan", str(tmp_path / f"{name}.toml"), "--model", str(guarded), "--store", str(store)]
        result = CliRunner().invoke(cli, args)
        assert expected in result.stdout, result.output
    inspected = CliRunner().invoke(cli, ["inspect", str(pipe.bundle.path)])
    assert compiled in inspected.stdout
    toolchain.build(tmp_path / "plain.toml", str(guarded), tmp_path / "bundle", store=store)
    assert read_bundle(tmp_path / "bundle").model["safety_checker"] == "left out"
    assert pipe.bundle.model["safety_checker"] == "compiled"
    assert left_out in CliRunner().invoke(cli, ["inspect", str(tmp_path / "bundle")]).stdout


@pytest.mark.parametrize(
    ("changes", "state"),
    [
        ({"requires_safety_checker": False}, None),
        ({"requires_safety_checker": True}, "left out"),
        ({"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}, "left out"),
        ({"safety_checker": [None, None]}, None),
    ],
)
def test_a_model_that_has_or_requires_one(tiny_copy: Path, changes: dict[str, Any], state: str | None) -> None:
    edit_index(tiny_copy, **changes)
    assert safety.state(resolve_model(str(tiny_copy)), recipe_for()) == state


def test_a_checker_that_is_not_there(tiny_model: Path) -> None:
    asked = parse_recipe(ASKED, "asked", "asked.toml")
    with pytest.raises(ModelError, match="no safety checker that could be compiled"):
        family_of(resolve_model(str(tiny_model)), asked)


def test_a_family_without_one_says_so() -> None:
    recipe = parse_recipe(ASKED.replace('"sd"', '"sdxl"'), "asked", "asked.toml")
    with pytest.raises(RecipeError, match="no safety checker for family sdxl"):
        check_recipe(recipe, MODELS["sdxl"], builder_of("onnxruntime"), None)


@pytest.mark.parametrize(
    "config", [{"size": {"height": 40, "width": 40}}, {"crop_size": 300}, {"resample": 2}, {"do_normalize": False}]
)
def test_another_way_to_prepare_pictures_is_refused(guarded: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    model = Path(shutil.copytree(guarded, tmp_path / "model"))
    (model / "feature_extractor" / "preprocessor_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match="does not support the safety checker"):
        family_of(resolve_model(str(model)), parse_recipe(ASKED, "asked", "asked.toml"))
    (model / "feature_extractor" / "preprocessor_config.json").write_text("{}")
    assert safety.extracted(resolve_model(str(model))) == SafetyInput(224, 224, safety.MEAN, safety.STD)


def test_a_hub_model_brings_it_where_it_is_asked_for() -> None:
    names = ["model_index.json", "unet/config.json", "safety_checker/config.json", "safety_checker/model.safetensors"]
    names += ["feature_extractor/preprocessor_config.json", "image_encoder/config.json"]
    assert select_files(names) == names[:2]
    assert select_files(names, safety=True) == names[:5]
    assert select_files(names, False, True) == [*names[:3], names[4]]
