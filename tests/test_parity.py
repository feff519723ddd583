"""The picture is diffusers' picture: every scheduler, both prediction types, batches, sizes, guidance on and off."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import toolchain
from tests.parity import LEAST_PSNR_DB, PROMPTS, SEEDS, Build, draw_with_diffusers, least_psnr_db, random_images
from toolchain.sampler.schedulers import compatible

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
STEPS = 5
BASE, FROM_IMAGE = "StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"
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
def v_pipe(build: Build, v_model: Path, tiny_recipe: Path) -> toolchain.Pipeline:
    return build("tiny", v_model, tiny_recipe.read_text())


def beta_schedulers() -> list[str]:
    """Names that can drive an SD model, found without loading one."""
    return [*compatible({"_class_name": "PNDMScheduler", "prediction_type": "epsilon"}), *OPTIONS]


def compare(pipe: toolchain.Pipeline, model: Path, scheduler: str) -> float:
    ours = pipe(PROMPTS, seed=SEEDS, steps=STEPS, guidance=5.0, scheduler=scheduler, size=(64, 96)).images
    theirs = draw_with_diffusers(
        BASE, model, PROMPTS, SEEDS, scheduler, num_inference_steps=STEPS, guidance_scale=5.0, height=64, width=96
    )
    return least_psnr_db(ours, theirs)


@pytest.mark.parametrize("scheduler", beta_schedulers())
def test_epsilon_picture_equals_diffusers(pipe: toolchain.Pipeline, tiny_model: Path, scheduler: str) -> None:
    assert compare(pipe, tiny_model, scheduler) >= LEAST_PSNR_DB


@pytest.mark.parametrize("scheduler", ["model", "ddim", "euler", "euler-a", "dpm++2m:karras", "unipc", "lcm"])
def test_v_prediction_picture_equals_diffusers(v_pipe: toolchain.Pipeline, v_model: Path, scheduler: str) -> None:
    assert compare(v_pipe, v_model, scheduler) >= LEAST_PSNR_DB


@pytest.fixture(scope="module")
def open_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights with a scheduler_config.json that leaves clip_sample and skip_prk_steps to diffusers."""
    folder = Path(shutil.copytree(tiny_model, tmp_path_factory.mktemp("open") / "model"))
    path = folder / "scheduler" / "scheduler_config.json"
    silent = {k: v for k, v in json.loads(path.read_text()).items() if k not in ("clip_sample", "skip_prk_steps")}
    path.write_text(json.dumps(silent))
    return folder


@pytest.fixture(scope="module")
def open_pipe(build: Build, open_model: Path, tiny_recipe: Path) -> toolchain.Pipeline:
    return build("tiny", open_model, tiny_recipe.read_text().replace('"1x64x64", ', ""))


@pytest.mark.parametrize("scheduler", ["ddim", "ddpm", "pndm", "euler", "model"])
def test_clamped_estimates_and_runge_kutta_steps(
    open_pipe: toolchain.Pipeline, open_model: Path, pipe: toolchain.Pipeline, scheduler: str
) -> None:
    assert compare(open_pipe, open_model, scheduler) >= LEAST_PSNR_DB
    if scheduler in ("ddim", "ddpm", "pndm"):  # and without them it is another picture
        assert compare(pipe, open_model, scheduler) < LEAST_PSNR_DB - 5


@pytest.mark.parametrize(
    ("guidance", "negative"), [(1.0, ""), (0.0, ""), (3.0, "a red circle"), (7.5, ["a red circle", ""])]
)
def test_guidance_and_negative_prompts(
    pipe: toolchain.Pipeline, tiny_model: Path, guidance: float, negative: str | list[str]
) -> None:
    prompts, seeds = ["a blue square", "a red circle"], [1, 2]
    ours = pipe(prompts, negative_prompt=negative, seed=seeds, steps=3, guidance=guidance, scheduler="ddim").images
    theirs = draw_with_diffusers(
        BASE,
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
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize("option", [{"clip_skip": 1}, {"clip_skip": 2}, {"guidance_rescale": 0.7}])
def test_options_of_the_pipeline(pipe: toolchain.Pipeline, tiny_model: Path, option: dict[str, Any]) -> None:
    prompts, seeds = ["a blue square", "a red circle"], [1, 2]
    negative = {"negative_prompt": ["left", "of"]}
    ours = pipe(prompts, seed=seeds, steps=3, guidance=6.0, scheduler="ddim", **negative, **option).images
    theirs = draw_with_diffusers(
        BASE, tiny_model, prompts, seeds, "ddim", num_inference_steps=3, guidance_scale=6.0, **negative, **option
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB
    plain = pipe(prompts, seed=seeds, steps=3, guidance=6.0, scheduler="ddim", **negative).images
    # Without the option it is another picture.
    assert max(least_psnr_db([a], [b]) for a, b in zip(ours, plain, strict=True)) < LEAST_PSNR_DB


@pytest.mark.parametrize("strength", [0.4, 0.75, 1.0])
@pytest.mark.parametrize("scheduler", ["model", "ddim", "euler", "euler-a", "heun", "dpm++2m:karras", "unipc", "lcm"])
def test_image_to_image(pipe: toolchain.Pipeline, tiny_model: Path, scheduler: str, strength: float) -> None:
    images = random_images(2, 64, 96)
    ours = pipe(
        PROMPTS, image=images, strength=strength, seed=SEEDS, steps=STEPS, guidance=5.0, scheduler=scheduler
    ).images
    theirs = draw_with_diffusers(
        FROM_IMAGE,
        tiny_model,
        PROMPTS,
        SEEDS,
        scheduler,
        image=images,
        strength=strength,
        num_inference_steps=STEPS,
        guidance_scale=5.0,
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize("count", [1, 2])
def test_images_are_repeated_in_the_order_of_diffusers(pipe: toolchain.Pipeline, tiny_model: Path, count: int) -> None:
    prompts, seeds = [*PROMPTS, *PROMPTS[::-1]], [3, 9, 5, 3]
    run: dict[str, Any] = {"image": random_images(count, 64, 96), "strength": 0.6}
    ours = pipe(prompts, seed=seeds, steps=3, guidance=5.0, scheduler="euler", **run).images
    run |= {"num_inference_steps": 3, "guidance_scale": 5.0}
    theirs = draw_with_diffusers(FROM_IMAGE, tiny_model, prompts, seeds, "euler", **run)
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


LISTED: list[tuple[str, dict[str, Any]]] = [
    ("euler", {"sigmas": [14.615, 6.475, 2.697, 0.652, 0.0]}),
    ("euler", {"timesteps": [999, 736, 343, 24]}),
    ("dpm++2m", {"timesteps": [999, 736, 343, 24]}),
    ("heun", {"timesteps": [999, 736, 343, 24]}),
    ("lcm", {"timesteps": [999, 343]}),
]


@pytest.mark.parametrize(("scheduler", "given"), LISTED)
def test_a_list_of_timesteps_or_sigmas(
    pipe: toolchain.Pipeline, tiny_model: Path, scheduler: str, given: dict[str, Any]
) -> None:
    ours = pipe(PROMPTS, seed=SEEDS, guidance=5.0, scheduler=scheduler, **given).images
    size = {"height": 64, "width": 64}
    theirs = draw_with_diffusers(BASE, tiny_model, PROMPTS, SEEDS, scheduler, guidance_scale=5.0, **given, **size)
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB
    images = random_images(2, 64, 96)
    kwargs: dict[str, Any] = {"image": images, "strength": 0.6, **given}
    ours = pipe(PROMPTS, seed=SEEDS, guidance=5.0, scheduler=scheduler, **kwargs).images
    theirs = draw_with_diffusers(FROM_IMAGE, tiny_model, PROMPTS, SEEDS, scheduler, guidance_scale=5.0, **kwargs)
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_steps_beside_a_list_have_no_effect(pipe: toolchain.Pipeline, caplog: pytest.LogCaptureFixture) -> None:
    ran = pipe(PROMPTS[0], seed=0, scheduler="euler", steps=7, sigmas=[10, 3, 0], decode=False).request
    assert (ran.scheduler, ran.steps) == ("euler:sigmas=10 3 0", 2)
    assert "steps has no effect" in caplog.text


def test_a_prompt_longer_than_the_encoder_is_cut_as_in_diffusers(
    pipe: toolchain.Pipeline, tiny_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompt = "a red circle left of " * 12 + "a blue square"
    ours = pipe(prompt, seed=4, steps=2, scheduler="euler").images
    theirs = draw_with_diffusers(
        BASE, tiny_model, [prompt], [4], "euler", num_inference_steps=2, guidance_scale=5.0, height=64, width=64
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB
    assert "blue square" in caplog.text
