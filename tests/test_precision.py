"""A float16 build with modules kept in float32 runs on the CPU and stays close to the float32 pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import toolchain
from tests.test_parity import draw_with_diffusers, psnr_db
from toolchain.errors import RequestError

RECIPE = """\
family = "sd"
buckets = ["1x64x64"]

[components.text_encoder]
dtype = "float16"
[components.denoiser]
dtype = "float16"
keep_float32 = ["conv_in", "conv_out", "time_embedding", "*.norm1"]
[components.vae_decoder]
dtype = "float16"

[sampling]
scheduler = "dpm++2m"
steps = 4

[check]
prompts = ["a red circle"]
psnr_db = 35.0
"""


def test_float16_pictures(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "half.toml"
    recipe.write_text(RECIPE)
    bundle = toolchain.build(recipe, str(tiny_model), tmp_path / "bundle", store=store)
    ours = np.asarray(toolchain.load(bundle.path)("a red circle", seed=0).images[0])
    theirs = draw_with_diffusers(
        tiny_model, ["a red circle"], [0], "dpm++2m", num_inference_steps=4, guidance_scale=5.0, height=64, width=64
    )[0]
    assert 35 <= psnr_db(ours, theirs) < 90  # equal would mean that nothing ran in float16


def test_without_guidance_the_batch_is_not_doubled(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "plain.toml"
    text = 'family = "sd"\nbuckets = ["1x64x64"]\nclassifier_free_guidance = false\n[check]\nprompts = ["a"]\n'
    recipe.write_text(text)
    bundle = toolchain.build(recipe, str(tiny_model), tmp_path / "bundle", store=store)
    assert bundle.engines["denoiser"]["1x64x64"].spec.input("context").shape[0] == 1
    pipe = toolchain.load(bundle.path)
    ours = np.asarray(pipe("a red circle", seed=0, steps=4, scheduler="ddim").images[0])
    theirs = draw_with_diffusers(
        tiny_model, ["a red circle"], [0], "ddim", num_inference_steps=4, guidance_scale=1.0, height=64, width=64
    )[0]
    assert psnr_db(ours, theirs) >= 60
    with pytest.raises(RequestError, match="negative prompt"):
        pipe("a red circle", negative_prompt="blue")
    with pytest.raises(RequestError, match="without classifier-free guidance"):
        pipe("a red circle", guidance=5.0)
