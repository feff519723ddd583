"""A float16 build with modules kept in float32 runs on the CPU and stays close to the float32 pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity import LEAST_PSNR_DB, Build, draw_with_diffusers, least_psnr_db
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


PROMPT = ["a red circle"]
BASE = "StableDiffusionPipeline"


def test_float16_pictures(build: Build, tiny_model: Path) -> None:
    ours = build("half", tiny_model, RECIPE)(PROMPT, seed=0).images
    theirs = draw_with_diffusers(
        BASE, tiny_model, PROMPT, [0], "dpm++2m", num_inference_steps=4, guidance_scale=5.0, height=64, width=64
    )
    assert 35 <= least_psnr_db(ours, theirs) < 90  # equal would mean that nothing ran in float16


def test_without_guidance_the_batch_is_not_doubled(build: Build, tiny_model: Path) -> None:
    text = 'family = "sd"\nbuckets = ["1x64x64"]\nclassifier_free_guidance = false\n[check]\nprompts = ["a"]\n'
    pipe = build("plain", tiny_model, text)
    assert pipe.bundle.engines["denoiser"]["1x64x64"].spec.input("context").shape[0] == 1
    ours = pipe(PROMPT, seed=0, steps=4, scheduler="ddim").images
    theirs = draw_with_diffusers(
        BASE, tiny_model, PROMPT, [0], "ddim", num_inference_steps=4, guidance_scale=1.0, height=64, width=64
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB
    with pytest.raises(RequestError, match="negative prompt"):
        pipe("a red circle", negative_prompt="blue")
    with pytest.raises(RequestError, match="without classifier-free guidance"):
        pipe("a red circle", guidance=5.0)
