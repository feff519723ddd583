"""The picture is diffusers' picture: every scheduler, both prediction types, batches, sizes, guidance on and off."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import toolchain
from toolchain.sampler.schedulers import compatible, create, parse, reference_kwargs

LEAST_PSNR_DB = 60.0
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
STEPS = 5
OPTIONS = (
    "ddim:eta=1.0",
    "ddim:spacing=trailing",
    "dpm++2m:karras",
    "dpm++2m:karras,sde",
    "dpm++2m:sde",
    "dpm++2m:order=3",
    "euler:karras",
    "euler:exponential",
    "euler:beta",
    "heun:karras",
    "unipc:order=3",
    "model",
)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


Draw = Callable[..., np.ndarray]


@functools.cache
def diffusers_pipeline(model: Path) -> Any:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    # diffusers 0.42 looks for the final layer norm, which clip skip needs, where transformers before 5 had it. Past
    # Module.__setattr__, which would make the encoder a child of its own.
    object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    return pipeline


def draw_with_diffusers(
    model: Path, prompts: list[str], seeds: list[int], scheduler: str, cls: Any = None, **kwargs: Any
) -> np.ndarray:
    """Pictures [N, H, W, 3] uint8 of the real pipeline, one generator per picture."""
    import torch

    spec = parse(scheduler)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    pipeline = diffusers_pipeline(model)
    if cls is not None:
        pipeline = cls.from_pipe(pipeline)
        pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = create(spec, config)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(prompts, generator=generators, output_type="np", **reference_kwargs(spec), **kwargs).images
    return (images * 255).round().astype(np.uint8)


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> toolchain.Pipeline:
    return toolchain.load(tiny_bundle)


@pytest.fixture(scope="module")
def v_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights read as v prediction."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("v") / "model"))
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction"}))
    return folder


@pytest.fixture(scope="module")
def v_pipe(
    v_model: Path, tiny_recipe: Path, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> toolchain.Pipeline:
    output = tmp_path_factory.mktemp("v-bundle") / "bundle"
    toolchain.build(tiny_recipe, str(v_model), output, store=store)
    return toolchain.load(output)


def beta_schedulers() -> list[str]:
    """Names that can drive an SD model, found without loading one."""
    return [*compatible({"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}), *OPTIONS]


def compare(pipe: toolchain.Pipeline, model: Path, scheduler: str) -> float:
    prompts, seeds = ["a red circle on a white background", "a blue square"], [3, 9]
    ours = pipe(prompts, seed=seeds, steps=STEPS, guidance=5.0, scheduler=scheduler, size=(64, 96)).images
    theirs = draw_with_diffusers(
        model, prompts, seeds, scheduler, num_inference_steps=STEPS, guidance_scale=5.0, height=64, width=96
    )
    return min(psnr_db(np.asarray(a), b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("scheduler", beta_schedulers())
def test_epsilon_picture_equals_diffusers(pipe: toolchain.Pipeline, tiny_model: Path, scheduler: str) -> None:
    assert compare(pipe, tiny_model, scheduler) >= LEAST_PSNR_DB


@pytest.mark.parametrize("scheduler", ["model", "ddim", "euler", "euler-a", "dpm++2m:karras", "unipc", "lcm"])
def test_v_prediction_picture_equals_diffusers(v_pipe: toolchain.Pipeline, v_model: Path, scheduler: str) -> None:
    assert compare(v_pipe, v_model, scheduler) >= LEAST_PSNR_DB


@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, ""), (0.0, ""), (3.0, "a red circle"), (7.5, ["a red circle", ""])]
)
def test_guidance_and_negative_prompts(
    pipe: toolchain.Pipeline, tiny_model: Path, guidance: float, negative: str | list[str]
) -> None:
    prompts, seeds = ["a blue square", "a red circle"], [1, 2]
    ours = pipe(prompts, negative_prompt=negative, seed=seeds, steps=3, guidance=guidance, scheduler="ddim").images
    theirs = draw_with_diffusers(
        tiny_model,
        prompts,
        seeds,
        "ddim",
        negative_prompt=negative if isinstance(negative, list) else [negative] * 2,
        num_inference_steps=3,
        guidance_scale=guidance,
        height=64,
        width=64,
    )
    assert min(psnr_db(np.asarray(a), b) for a, b in zip(ours, theirs, strict=True)) >= LEAST_PSNR_DB


@pytest.mark.parametrize("option", [{"clip_skip": 1}, {"clip_skip": 2}, {"guidance_rescale": 0.7}])
def test_options_of_the_pipeline(pipe: toolchain.Pipeline, tiny_model: Path, option: dict[str, Any]) -> None:
    prompts, seeds = ["a blue square", "a red circle"], [1, 2]
    negative = {"negative_prompt": ["left", "of"]}
    ours = pipe(prompts, seed=seeds, steps=3, guidance=6.0, scheduler="ddim", **negative, **option).images
    theirs = draw_with_diffusers(
        tiny_model, prompts, seeds, "ddim", num_inference_steps=3, guidance_scale=6.0, **negative, **option
    )
    assert min(psnr_db(np.asarray(a), b) for a, b in zip(ours, theirs, strict=True)) >= LEAST_PSNR_DB
    plain = pipe(prompts, seed=seeds, steps=3, guidance=6.0, scheduler="ddim", **negative).images
    # Without the option it is another picture.
    assert max(psnr_db(np.asarray(a), np.asarray(b)) for a, b in zip(ours, plain, strict=True)) < LEAST_PSNR_DB


@pytest.mark.parametrize("strength", [0.4, 0.75, 1.0])
@pytest.mark.parametrize("scheduler", ["model", "ddim", "euler", "euler-a", "heun", "dpm++2m:karras", "unipc", "lcm"])
def test_image_to_image(pipe: toolchain.Pipeline, tiny_model: Path, scheduler: str, strength: float) -> None:
    from diffusers import StableDiffusionImg2ImgPipeline

    prompts, seeds = ["a red circle on a white background", "a blue square"], [3, 9]
    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (64, 96, 3), np.uint8)) for _ in prompts]
    ours = pipe(
        prompts, image=images, strength=strength, seed=seeds, steps=STEPS, guidance=5.0, scheduler=scheduler
    ).images
    theirs = draw_with_diffusers(
        tiny_model,
        prompts,
        seeds,
        scheduler,
        cls=StableDiffusionImg2ImgPipeline,
        image=images,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
    )
    assert min(psnr_db(np.asarray(a), b) for a, b in zip(ours, theirs, strict=True)) >= LEAST_PSNR_DB


def test_a_prompt_longer_than_the_encoder_is_cut_as_in_diffusers(
    pipe: toolchain.Pipeline, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a red circle left of " * 12 + "a blue square"
    ours = pipe(prompt, seed=4, steps=2, scheduler="euler").images[0]
    theirs = draw_with_diffusers(
        tiny_model, [prompt], [4], "euler", num_inference_steps=2, guidance_scale=5.0, height=64, width=64
    )[0]
    assert psnr_db(np.asarray(ours), theirs) >= LEAST_PSNR_DB
    assert "blue square" in caplog.text
