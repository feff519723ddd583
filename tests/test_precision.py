"""A float16 build with modules kept in float32 runs on the CPU and stays close to the float32 pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import toolchain
from tests.parity import LEAST_PSNR_DB, Build, draw_with_diffusers, least_psnr_db
from toolchain.engines.buffers import HostMemory
from toolchain.engines.runners import runner_of
from toolchain.errors import RequestError
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.runtime.engines import open_engine

RECIPE = """\
family = "sd"
buckets = ["1x64x64"]

[components.text_encoder]
dtype = "float16"
keep_float32 = ["*"]
[components.denoiser]
dtype = "float16"
keep_float32 = ["conv_in", "conv_out", "time_embedding", "*.norm1"]
[components.vae_decoder]
dtype = "float16"
keep_float32 = ["*"]

[sampling]
scheduler = "dpm++2m"
steps = 4
step_counts = [4]

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


def snr_db(pipe: toolchain.Pipeline, model: Path, name: str) -> float:
    """Of an engine against the float32 module, over all float32 outputs, for inputs that need no sampler."""
    source = resolve_model(str(model))
    entry = pipe.bundle.engine(name, pipe.bundle.buckets[0])
    generator = np.random.default_rng(0)
    inputs: dict[str, np.ndarray] = {}
    for t in entry.spec.inputs:
        floats = t.dtype == "float32"
        inputs[t.name] = generator.standard_normal(t.shape, np.float32) if floats else np.ones(t.shape, t.dtype)
    outputs = {t.name: np.zeros(t.shape, t.dtype) for t in entry.spec.outputs}
    backend = runner_of(pipe.bundle.backend)
    open_engine(pipe.bundle, backend, name, pipe.bundle.buckets[0], HostMemory()).bind({**inputs, **outputs})()
    with torch.no_grad():
        expected = (
            MODELS["sd"]
            .component(name)
            .reference(source, pipe.bundle.recipe)(**{n: torch.from_numpy(a) for n, a in inputs.items()})
        )
    tensors = [expected] if isinstance(expected, torch.Tensor) else list(expected)
    pairs = [(a, t.numpy()) for a, t in zip(outputs.values(), tensors, strict=True) if a.dtype == np.float32]
    power = sum(float((e.astype(np.float64) ** 2).sum()) for _, e in pairs)
    error = sum(float(((a - e).astype(np.float64) ** 2).sum()) for a, e in pairs)
    return float(10 * np.log10(power / error))


def test_what_is_kept_in_float32_costs_no_accuracy(build: Build, tiny_model: Path) -> None:
    """Casts between modules that are kept, and around them, round nothing that was float32 on both sides."""
    plain = "".join(line for line in RECIPE.splitlines(keepends=True) if not line.startswith("keep_float32"))
    kept, low = build("half", tiny_model, RECIPE), build("whole-half", tiny_model, plain)
    for name in ("text_encoder", "vae_decoder"):  # kept as a whole, they are float32
        assert snr_db(kept, tiny_model, name) > 100 > 80 > snr_db(low, tiny_model, name)
    prompts, seeds = ["a red circle"] * 4, [0, 1, 2, 3]
    theirs = draw_with_diffusers(
        BASE, tiny_model, prompts, seeds, "dpm++2m", num_inference_steps=4, guidance_scale=5.0, height=64, width=64
    )
    ours, without = (pipe(prompts, seed=seeds).images for pipe in (kept, low))
    assert least_psnr_db(ours, theirs) > least_psnr_db(without, theirs)


def test_without_guidance_the_batch_is_not_doubled(build: Build, tiny_model: Path) -> None:
    text = 'family = "sd"\nbuckets = ["1x64x64"]\nclassifier_free_guidance = false\n'
    text += '[sampling]\nstep_counts = [4]\n[check]\nprompts = ["a"]\n'
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
