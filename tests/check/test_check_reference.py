"""The reference pipeline loads from what is downloaded, each component in the weights that it has."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from toolchain.bundle.bundle import read_bundle
from toolchain.check.pictures import compare_pictures, draw
from toolchain.check.reference import reference_pipeline
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.recipe import Check, Sampling, load_recipe
from toolchain.runtime.pipeline import Pipeline


def test_folders_that_are_not_downloaded_are_not_asked_for(tiny_copy: Path, tiny_recipe: Path) -> None:
    path = tiny_copy / "model_index.json"
    unused = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | unused))
    pipeline, changes = reference_pipeline(resolve_model(str(tiny_copy)), MODELS["sd"], load_recipe(tiny_recipe))
    assert all(getattr(pipeline, name) is None for name in unused)
    assert changes == ["float32 throughout", "without " + ", ".join(unused)]


def test_components_of_different_variants(tiny_copy: Path, tiny_recipe: Path) -> None:
    for folder, file, variant in (
        ("unet", "diffusion_pytorch_model", "fp16"),
        ("vae", "diffusion_pytorch_model", "ema"),
    ):
        path = tiny_copy / folder / f"{file}.safetensors"
        path.rename(path.with_name(f"{file}.{variant}.safetensors"))
    pipeline, _ = reference_pipeline(resolve_model(str(tiny_copy)), MODELS["sd"], load_recipe(tiny_recipe))
    for name in ("unet", "vae", "text_encoder"):
        network = getattr(pipeline, name)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not network.training


@pytest.mark.parametrize("named", [None, "EulerDiscreteScheduler"])
def test_the_reference_keeps_the_scheduler_that_diffusers_loads(
    tiny_bundle: Path, tiny_copy: Path, named: str | None
) -> None:
    """A bundle that follows another class than model_index.json names is found out, for nothing is put in its place."""
    path = tiny_copy / "model_index.json"
    index = json.loads(path.read_text())
    if named:
        path.write_text(json.dumps(index | {"scheduler": ["diffusers", named]}))
    bundle = read_bundle(tiny_bundle)
    sampling, check = Sampling(steps=4), Check(("a red circle on a white background",))
    recipe = replace(bundle.recipe, buckets=bundle.recipe.buckets[:1], sampling=sampling, check=check)
    bundle = replace(bundle, recipe=recipe)
    pipeline = Pipeline(bundle, warm_up=False, open_buckets=1)
    drawn = draw(pipeline, lambda text: None)
    pipeline.close()
    source = resolve_model(str(tiny_copy))
    pictures, changes = compare_pictures(bundle, source, MODELS["sd"], drawn, lambda text: None)
    assert [p.passed for p in pictures] == [named is None]
    assert changes == ["float32 throughout", "4 steps at guidance 5, the recipe's"]


def test_a_named_scheduler_is_told(tiny_bundle: Path, tiny_model: Path) -> None:
    bundle = read_bundle(tiny_bundle)
    _, changes = compare_pictures(bundle, resolve_model(str(tiny_model)), MODELS["sd"], [], lambda text: None)
    assert changes[-1] == "the scheduler euler, a EulerDiscreteScheduler, in place of the model's PNDMScheduler"
