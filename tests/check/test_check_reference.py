"""The reference pipeline loads from what is downloaded, each component in the weights that it has."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from toolchain.check.reference import reference_pipeline
from toolchain.models import MODELS, resolve_model
from toolchain.recipe import load_recipe


def test_folders_that_are_not_downloaded_are_not_asked_for(tiny_copy: Path, tiny_recipe: Path) -> None:
    path = tiny_copy / "model_index.json"
    unused = {
        "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
        "feature_extractor": ["transformers", "CLIPImageProcessor"],
        "image_encoder": ["transformers", "CLIPVisionModelWithProjection"],
    }
    path.write_text(json.dumps(json.loads(path.read_text()) | unused))
    pipeline = reference_pipeline(resolve_model(str(tiny_copy)), MODELS["sd"], load_recipe(tiny_recipe))
    assert all(getattr(pipeline, name) is None for name in unused)


def test_components_of_different_variants(tiny_copy: Path, tiny_recipe: Path) -> None:
    for folder, file, variant in (
        ("unet", "diffusion_pytorch_model", "fp16"),
        ("vae", "diffusion_pytorch_model", "ema"),
    ):
        path = tiny_copy / folder / f"{file}.safetensors"
        path.rename(path.with_name(f"{file}.{variant}.safetensors"))
    pipeline = reference_pipeline(resolve_model(str(tiny_copy)), MODELS["sd"], load_recipe(tiny_recipe))
    for name in ("unet", "vae", "text_encoder"):
        network = getattr(pipeline, name)
        assert {p.dtype for p in network.parameters()} == {torch.float32}
        assert not network.training
