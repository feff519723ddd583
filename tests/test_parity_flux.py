"""FLUX's picture is diffusers' picture: dev and schnell, both kinds of guidance, second prompts, image to image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests import parity
from tests.parity import LEAST_PSNR_DB, OTHERS, PROMPTS, SEEDS, Build, least_psnr_db, random_images
from tests.tiny_flux import T5_TOKENS, make_flux, recipe_text
from toolchain.bundle.forecast import forecast
from toolchain.check.pictures import compare_pictures, draw
from toolchain.errors import RequestError
from toolchain.models.hub import resolve_model
from toolchain.models.registry import family_of
from toolchain.runtime.resolve import _warn_once

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
NEGATIVE = {"negative_prompt": ["left", "of white"]}
# Those of the list that FluxPipeline can drive: it gives the others arguments that their set_timesteps does not take.
SCHEDULERS = ["model", "flow-euler", "dpm++2m", "unipc", "deis"]


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("flux") / "dev")


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_flux(tmp_path_factory.mktemp("flux") / "schnell", guidance_embeds=False, eos_token_id=2)


@pytest.fixture(scope="module")
def guided(build: Build, dev: Path) -> toolchain.Pipeline:
    return build("flux-guided", dev, recipe_text(guided=True, bucket="2x64x96", without=("vae_encoder",)))


@pytest.fixture(scope="module")
def plain(build: Build, dev: Path) -> toolchain.Pipeline:
    return build("flux-plain", dev, recipe_text(guided=False, bucket="1x64x64"))


@pytest.fixture(scope="module")
def fast(build: Build, schnell: Path) -> toolchain.Pipeline:
    return build("flux-fast", schnell, recipe_text(guided=False, bucket="1x64x64"))


def draw_with_diffusers(
    model: Path, prompts: list[str], seeds: list[int] | None, scheduler: str, kind: str = "FluxPipeline", **kwargs: Any
) -> np.ndarray:
    return parity.draw_with_diffusers(kind, model, prompts, seeds, scheduler, max_sequence_length=T5_TOKENS, **kwargs)


def test_the_memory_of_every_operator_is_known(plain: toolchain.Pipeline) -> None:
    assert forecast(plain.bundle).unknown == ()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(guided: toolchain.Pipeline, dev: Path, scheduler: str) -> None:
    ours = guided(PROMPTS, seed=SEEDS, steps=5, guidance=3.5, scheduler=scheduler).images
    theirs = draw_with_diffusers(
        dev, PROMPTS, SEEDS, scheduler, num_inference_steps=5, guidance_scale=3.5, height=64, width=96
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize(
    ("guidance", "options", "reference"),
    [
        (3.5, {"true_cfg": 2.5, **NEGATIVE}, {"true_cfg_scale": 2.5, **NEGATIVE}),
        (0.0, {"true_cfg": 1.5, "negative_prompt": ""}, {"true_cfg_scale": 1.5, "negative_prompt": ["", ""]}),
        (1.0, {"prompt_2": OTHERS}, {"prompt_2": OTHERS}),
        (1.0, {"negative_prompt_2": OTHERS}, {"negative_prompt_2": OTHERS}),
        (
            7.0,
            {"true_cfg": 4.0, "prompt_2": OTHERS, **NEGATIVE, "negative_prompt_2": OTHERS[::-1]},
            {"true_cfg_scale": 4.0, "prompt_2": OTHERS, **NEGATIVE, "negative_prompt_2": OTHERS[::-1]},
        ),
    ],
    ids=["negative", "empty-negative", "second-prompt", "second-negative", "all"],
)
def test_guidance_and_prompts(
    guided: toolchain.Pipeline, dev: Path, guidance: float, options: dict[str, Any], reference: dict[str, Any]
) -> None:
    run = {"seed": SEEDS, "steps": 3}
    ours = guided(PROMPTS, guidance=guidance, **run, **options).images
    theirs = draw_with_diffusers(
        dev, PROMPTS, SEEDS, "model", num_inference_steps=3, guidance_scale=guidance, height=64, width=96, **reference
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB
    # Every option counts: without them it is another picture.
    assert least_psnr_db(guided(PROMPTS, guidance=3.0, **run).images, theirs) < LEAST_PSNR_DB / 2


@pytest.mark.parametrize(("steps", "guidance"), [(4, 3.5), (2, 0.0)])
def test_dev_without_true_guidance(plain: toolchain.Pipeline, dev: Path, steps: int, guidance: float) -> None:
    ours = plain(PROMPTS, seed=SEEDS, steps=steps, guidance=guidance).images
    theirs = draw_with_diffusers(
        dev, PROMPTS, SEEDS, "model", num_inference_steps=steps, guidance_scale=guidance, height=64, width=64
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_a_check_draws_at_the_guidance_of_the_recipe(plain: toolchain.Pipeline, dev: Path) -> None:
    """On both sides: guidance is an input of the network, also without a second pass."""
    source, recipe = resolve_model(str(dev)), plain.bundle.recipe
    assert recipe.sampling.guidance == 3.5
    drawn = draw(plain, lambda text: None)
    ours = [plain(d.prompt, seed=d.seed, guidance=3.5).images[0] for d in drawn]
    assert all(np.array_equal(d.pixels, np.asarray(o)) for d, o in zip(drawn, ours, strict=True))
    compared, _ = compare_pictures(plain.bundle, source, family_of(source, recipe), drawn, lambda text: None)
    assert [p.failed for p in compared] == [()] * 4
    others = [np.asarray(plain(d.prompt, seed=d.seed, guidance=1.0).images[0]) for d in drawn]
    assert least_psnr_db(ours, np.stack(others)) < recipe.picture_limits["psnr_db"]


@pytest.mark.parametrize("steps", [1, 4])
def test_schnell(fast: toolchain.Pipeline, schnell: Path, steps: int) -> None:
    ours = fast(PROMPTS, seed=SEEDS, steps=steps, guidance=0.0).images
    theirs = draw_with_diffusers(
        schnell, PROMPTS, SEEDS, "model", num_inference_steps=steps, guidance_scale=0.0, height=64, width=64
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


# With five steps 0.3 and 0.5 fall between two: FLUX starts at the earlier, Stable Diffusion at the later.
@pytest.mark.parametrize("strength", [0.3, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("kind", ["dev", "schnell"])
def test_image_to_image(request: pytest.FixtureRequest, kind: str, strength: float) -> None:
    model, pipe = request.getfixturevalue(kind), request.getfixturevalue({"dev": "plain", "schnell": "fast"}[kind])
    images = random_images(2, 64, 64)
    ours = pipe(PROMPTS, image=images, strength=strength, seed=SEEDS, steps=5, guidance=1.0).images
    theirs = draw_with_diffusers(
        model,
        PROMPTS,
        SEEDS,
        "model",
        "FluxImg2ImgPipeline",
        image=images,
        strength=strength,
        num_inference_steps=5,
        guidance_scale=1.0,
        height=64,
        width=64,
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize("count", [1, 2])
def test_a_repeated_image_is_encoded_once_as_in_diffusers(plain: toolchain.Pipeline, dev: Path, count: int) -> None:
    """With the generators of the first prompts; those of the others draw nothing for it."""
    prompts, seeds, images = [*PROMPTS, *OTHERS], [3, 9, 5, 3], random_images(count, 64, 64)
    run: dict[str, Any] = {"image": images, "strength": 0.6}
    ours = plain(prompts, seed=seeds, steps=3, guidance=1.0, **run).images
    run |= {"num_inference_steps": 3, "guidance_scale": 1.0, "height": 64, "width": 64}
    theirs = draw_with_diffusers(dev, prompts, seeds, "model", "FluxImg2ImgPipeline", **run)
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


def test_noise_is_drawn_in_packed_order(plain: toolchain.Pipeline, dev: Path) -> None:
    """FluxPipeline gives its scheduler no generator: the noise goes on in torch's own, as do latents without one."""
    import torch

    ours = plain(PROMPTS[0], seed=5, steps=4, guidance=3.5, scheduler="flow-lcm")
    assert ours.table.stochastic
    torch.manual_seed(5)
    theirs = draw_with_diffusers(
        dev, PROMPTS[:1], None, "flow-lcm", num_inference_steps=4, guidance_scale=3.5, height=64, width=64
    )
    assert least_psnr_db(ours.images, theirs) >= LEAST_PSNR_DB


def test_a_prompt_longer_than_both_encoders_is_cut_as_in_diffusers(plain: toolchain.Pipeline, dev: Path) -> None:
    prompt = "a red circle left of " * 12 + "a blue square"
    ours = plain(prompt, seed=4, steps=2, guidance=2.0).images
    theirs = draw_with_diffusers(
        dev, [prompt], [4], "model", num_inference_steps=2, guidance_scale=2.0, height=64, width=64
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


# What FluxPipeline does not look at, a bundle does not either; each says so once.
IGNORED = [
    ("fast", {"guidance": 7.5}, {"guidance_scale": 7.5}, "guidance has no effect"),
    ("fast", NEGATIVE, NEGATIVE, "a negative prompt has no effect"),
    ("plain", NEGATIVE, NEGATIVE, "a negative prompt has no effect"),
    ("plain", {"negative_prompt_2": OTHERS}, {"negative_prompt_2": OTHERS}, "a negative prompt has no effect"),
    ("plain", {"true_cfg": 2.0}, {"true_cfg_scale": 2.0}, "true_cfg has no effect"),
    ("plain", {"true_cfg": 0.5, **NEGATIVE}, {"true_cfg_scale": 0.5, **NEGATIVE}, "a negative prompt has no effect"),
    ("guided", NEGATIVE, NEGATIVE, "a negative prompt has no effect"),
    ("guided", {"true_cfg": 2.0}, {"true_cfg_scale": 2.0}, "true_cfg has no effect"),
    ("guided", {"true_cfg": 0.5, **NEGATIVE}, {"true_cfg_scale": 0.5, **NEGATIVE}, "a negative prompt has no effect"),
]


@pytest.mark.parametrize(("bundle", "options", "reference", "warning"), IGNORED)
def test_what_diffusers_ignores_is_ignored_and_said_once(
    request: pytest.FixtureRequest,
    caplog: pytest.LogCaptureFixture,
    bundle: str,
    options: dict[str, Any],
    reference: dict[str, Any],
    warning: str,
) -> None:
    pipe = request.getfixturevalue(bundle)
    model = request.getfixturevalue("schnell" if bundle == "fast" else "dev")
    (height, width), *_ = {(b.height, b.width) for b in pipe.bundle.buckets}
    _warn_once.cache_clear()
    ours = [pipe(PROMPTS, seed=SEEDS, steps=1, **options) for _ in range(2)]
    scale = {"guidance_scale": 3.5} | reference
    theirs = draw_with_diffusers(
        model, PROMPTS, SEEDS, "model", num_inference_steps=1, height=height, width=width, **scale
    )
    assert least_psnr_db(ours[1].images, theirs) >= LEAST_PSNR_DB
    said = [record.getMessage() for record in caplog.records if "has no effect" in record.getMessage()]
    assert len(said) == 1
    assert warning in said[0]
    assert said[0].endswith("as in diffusers")
    # What is written down of a picture is what it was drawn with.
    assert ours[0].request.negatives == ["", ""]
    assert ours[0].request.true_cfg == 1.0
    assert ours[0].request.guidance == (1.0 if bundle == "fast" else 3.5)


def test_what_diffusers_is_told_to_do_says_nothing(
    fast: toolchain.Pipeline, guided: toolchain.Pipeline, caplog: pytest.LogCaptureFixture
) -> None:
    _warn_once.cache_clear()
    for guidance in (None, 0.0, 1.0):
        fast("a circle", steps=1, guidance=guidance, negative_prompt="")
    guided("a circle", steps=1, true_cfg=2.0, negative_prompt="")
    guided("a circle", steps=1, true_cfg=1.0)
    assert "has no effect" not in caplog.text


def test_options_that_a_bundle_does_not_have(plain: toolchain.Pipeline, guided: toolchain.Pipeline) -> None:
    with pytest.raises(RequestError, match="no true classifier-free guidance"):
        plain("a circle", true_cfg=2.0, negative_prompt="a square")
    for scale in (-1.0, float("nan")):
        with pytest.raises(RequestError, match="true_cfg"):
            plain("a circle", true_cfg=scale)
    with pytest.raises(RequestError, match="clip_skip"):
        guided("a circle", clip_skip=1)
