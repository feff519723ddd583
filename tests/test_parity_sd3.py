"""SD3's picture is diffusers' picture: 3.5 with T5 and 3 without, every prompt, guidance, image to image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests import parity
from tests.parity import LEAST_PSNR_DB, OTHERS, PROMPTS, SEEDS, Build, least_psnr_db, random_images
from tests.tiny_sd3 import T5_TOKENS, make_sd3, recipe_text
from toolchain.bundle.forecast import forecast
from toolchain.errors import RequestError
from toolchain.runtime.resolve import _warn_once

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
NEGATIVES = ["left", "of white"]
BASE, FROM_IMAGE = "StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3.5 with T5, its schedule shifted by a constant."""
    return make_sd3(tmp_path_factory.mktemp("sd3") / "with-t5")


@pytest.fixture(scope="module")
def lean_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 without T5, its schedule shifted by the number of tokens."""
    return make_sd3(tmp_path_factory.mktemp("sd3") / "lean", version="3", t5=False, dynamic=True)


@pytest.fixture(scope="module")
def pipe(build: Build, model: Path) -> toolchain.Pipeline:
    return build("sd3-guided", model, recipe_text())


@pytest.fixture(scope="module")
def lean(build: Build, lean_model: Path) -> toolchain.Pipeline:
    return build("sd3-lean", lean_model, recipe_text(guided=False, t5=False, bucket="1x64x64"))


def draw_with_diffusers(
    model: Path, prompts: list[str], seeds: list[int] | None, scheduler: str, kind: str = BASE, **kwargs: Any
) -> np.ndarray:
    if parity.diffusers_pipeline(model, kind).text_encoder_3 is not None:
        kwargs["max_sequence_length"] = T5_TOKENS
    return parity.draw_with_diffusers(kind, model, prompts, seeds, scheduler, **kwargs)


def test_the_memory_of_every_operator_is_known(pipe: toolchain.Pipeline) -> None:
    assert forecast(pipe.bundle).unknown == ()


@pytest.mark.parametrize("scheduler", ["model", "flow-euler", "flow-heun", "dpm++2m", "unipc", "deis"])
def test_schedulers(pipe: toolchain.Pipeline, model: Path, scheduler: str) -> None:
    ours = pipe(PROMPTS, seed=SEEDS, steps=5, guidance=4.5, scheduler=scheduler).images
    theirs = draw_with_diffusers(
        model, PROMPTS, SEEDS, scheduler, num_inference_steps=5, guidance_scale=4.5, height=64, width=96
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize(
    "options",
    [
        {"negative_prompt": NEGATIVES},
        {"prompt_2": OTHERS},
        {"prompt_3": OTHERS},
        {"negative_prompt_2": PROMPTS},
        {"negative_prompt_3": PROMPTS},
        {"negative_prompt": NEGATIVES, "negative_prompt_2": PROMPTS},
        {"negative_prompt": NEGATIVES, "negative_prompt_3": PROMPTS},
        {"clip_skip": 1},
        {
            "clip_skip": 2,
            "prompt_2": OTHERS,
            "prompt_3": OTHERS[::-1],
            "negative_prompt": NEGATIVES,
            "negative_prompt_2": PROMPTS,
            "negative_prompt_3": NEGATIVES[::-1],
        },
    ],
    ids="+".join,
)
def test_prompts_and_clip_skip(pipe: toolchain.Pipeline, model: Path, options: dict[str, Any]) -> None:
    run = {"seed": SEEDS, "steps": 3, "guidance": 7.0}
    ours = pipe(PROMPTS, **run, **options).images
    theirs = draw_with_diffusers(
        model, PROMPTS, SEEDS, "model", num_inference_steps=3, guidance_scale=7.0, height=64, width=96, **options
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB
    # Every option counts: without it, or with the last prompt alone changed back, it is another picture.
    plain = [pipe(PROMPTS, **run)]
    if len(options) > 1:
        plain.append(pipe(PROMPTS, **run, **dict(list(options.items())[:-1])))
    assert all(least_psnr_db(other.images, theirs) < 45 for other in plain)


@pytest.mark.parametrize("guidance", [0.0, 1.0, 1.5])
def test_guidance(pipe: toolchain.Pipeline, model: Path, guidance: float) -> None:
    ours = pipe(PROMPTS, seed=SEEDS, steps=3, guidance=guidance).images
    theirs = draw_with_diffusers(
        model, PROMPTS, SEEDS, "model", num_inference_steps=3, guidance_scale=guidance, height=64, width=96
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize("steps", [1, 4])
def test_without_t5_and_guidance(lean: toolchain.Pipeline, lean_model: Path, steps: int) -> None:
    ours = lean(PROMPTS, seed=SEEDS, steps=steps, prompt_2=OTHERS).images
    theirs = draw_with_diffusers(
        lean_model,
        PROMPTS,
        SEEDS,
        "model",
        prompt_2=OTHERS,
        num_inference_steps=steps,
        guidance_scale=1.0,
        height=64,
        width=64,
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_a_negative_prompt_without_guidance(
    lean: toolchain.Pipeline, lean_model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """diffusers does not look at it where the guidance says none; who says nothing may expect diffusers' default."""
    _warn_once.cache_clear()
    ours = [lean(PROMPTS, negative_prompt="left", seed=SEEDS, steps=3, guidance=1.0) for _ in range(2)]
    theirs = draw_with_diffusers(
        lean_model,
        PROMPTS,
        SEEDS,
        "model",
        num_inference_steps=3,
        guidance_scale=1.0,
        negative_prompt=["left", "left"],
        height=64,
        width=64,
    )
    assert least_psnr_db(ours[1].images, theirs) >= LEAST_PSNR_DB
    assert ours[0].request.negatives == ["", ""]
    assert caplog.text.count("a negative prompt has no effect without guidance above 1") == 1
    with pytest.raises(RequestError, match="a bundle without guidance cannot use a negative prompt"):
        lean(PROMPTS, negative_prompt="left", seed=SEEDS, steps=3)


# With five steps 0.3 and 0.5 fall between two: SD3 starts at the earlier, Stable Diffusion at the later.
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize(("kind", "guidance"), [("with-t5", 4.5), ("lean", 1.0)])
def test_image_to_image(request: pytest.FixtureRequest, kind: str, guidance: float, strength: float) -> None:
    pipe = request.getfixturevalue({"with-t5": "pipe", "lean": "lean"}[kind])
    model = request.getfixturevalue({"with-t5": "model", "lean": "lean_model"}[kind])
    height, width = (64, 96) if kind == "with-t5" else (64, 64)
    images = random_images(2, height, width)
    ours = pipe(PROMPTS, image=images, strength=strength, seed=SEEDS, steps=5, guidance=guidance).images
    theirs = draw_with_diffusers(
        model,
        PROMPTS,
        SEEDS,
        "model",
        FROM_IMAGE,
        image=images,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=guidance,
        height=height,
        width=width,
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_image_to_image_with_a_solver_of_second_order(pipe: toolchain.Pipeline, model: Path) -> None:
    (image,) = random_images(1, 64, 96, seed=1)
    ours = pipe(PROMPTS, image=image, strength=0.5, seed=SEEDS, steps=5, guidance=4.5, scheduler="flow-heun").images
    theirs = draw_with_diffusers(
        model,
        PROMPTS,
        SEEDS,
        "flow-heun",
        FROM_IMAGE,
        image=[image] * 2,
        strength=0.5,
        num_inference_steps=5,
        guidance_scale=4.5,
        height=64,
        width=96,
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_noise_of_stochastic_schedulers(lean: toolchain.Pipeline, lean_model: Path) -> None:
    """The pipeline gives its scheduler no generator: the noise goes on in torch's own, as do latents without one."""
    import torch

    ours = lean(PROMPTS[0], seed=5, steps=4, scheduler="flow-lcm")
    assert ours.table.stochastic
    torch.manual_seed(5)
    theirs = draw_with_diffusers(
        lean_model, PROMPTS[:1], None, "flow-lcm", num_inference_steps=4, guidance_scale=1.0, height=64, width=64
    )
    assert least_psnr_db(ours.images, theirs) >= LEAST_PSNR_DB


def test_prompts_longer_than_every_encoder_are_cut_as_in_diffusers(
    pipe: toolchain.Pipeline, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = ["a red circle left of " * 12 + "a blue square", "a"]
    ours = pipe(prompts, seed=SEEDS, steps=2, guidance=4.5).images
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert f"tokens of {name};" in caplog.text
    theirs = draw_with_diffusers(
        model, prompts, SEEDS, "model", num_inference_steps=2, guidance_scale=4.5, height=64, width=96
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_options_that_a_bundle_does_not_have(pipe: toolchain.Pipeline, lean: toolchain.Pipeline) -> None:
    with pytest.raises(RequestError, match="no text encoder for prompt_3"):
        lean("a circle", prompt_3="a square")
    with pytest.raises(RequestError, match="without classifier-free guidance"):
        lean("a circle", guidance=4.5)
    with pytest.raises(RequestError, match="no guidance that could be rescaled"):
        pipe("a circle", guidance_rescale=0.5)
    with pytest.raises(RequestError, match="clip_skip"):
        pipe("a circle", clip_skip=3)
