"""SDXL's picture is diffusers' picture: both encoders' prompts, zeros for none, sizes as conditions, image to image."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests import parity
from tests.parity import LEAST_PSNR_DB, OTHERS, PROMPTS, SEEDS, Build, least_psnr_db, random_images
from tests.tiny_sdxl import make_sdxl, recipe_text
from toolchain.bundle.forecast import forecast
from toolchain.errors import RequestError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
WIDE = (64, 96)
SCHEDULERS = ["model", "ddim", "euler-a", "dpm++2m", "dpm++2m:karras", "dpm++2m:karras,sde", "unipc"]
BASE, FROM_IMAGE = "StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("sdxl") / "model")


@pytest.fixture(scope="module")
def model_without_zeros(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights; no negative prompt is the empty prompt."""
    folder = Path(shutil.copytree(model, tmp_path_factory.mktemp("sdxl-empty") / "model"))
    path = folder / "model_index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"force_zeros_for_empty_prompt": False}))
    return folder


@pytest.fixture(scope="module")
def pipe(build: Build, model: Path) -> toolchain.Pipeline:
    return build("sdxl-guided", model, recipe_text())


@pytest.fixture(scope="module")
def pipe_without_zeros(build: Build, model_without_zeros: Path) -> toolchain.Pipeline:
    return build("sdxl-empty", model_without_zeros, recipe_text())


@pytest.fixture(scope="module")
def plain(build: Build, model: Path) -> toolchain.Pipeline:
    return build("sdxl-plain", model, recipe_text(guided=False, buckets=("2x64x96",)))


def draw_with_diffusers(model: Path, prompts: list[str], scheduler: str, kind: str = BASE, **kwargs: Any) -> np.ndarray:
    return parity.draw_with_diffusers(kind, model, prompts, SEEDS[: len(prompts)], scheduler, **kwargs)


def test_the_memory_of_every_operator_is_known(pipe: toolchain.Pipeline) -> None:
    assert forecast(pipe.bundle).unknown == ()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_schedulers(pipe: toolchain.Pipeline, model: Path, scheduler: str) -> None:
    ours = pipe(PROMPTS, seed=SEEDS, steps=5, guidance=5.0, scheduler=scheduler, size=WIDE).images
    theirs = draw_with_diffusers(
        model, PROMPTS, scheduler, num_inference_steps=5, guidance_scale=5.0, height=64, width=96
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize("scheduler", ["model", "euler-a"])
@pytest.mark.parametrize("guidance", [0.0, 1.0])
def test_without_guidance(
    pipe: toolchain.Pipeline, plain: toolchain.Pipeline, model: Path, guidance: float, scheduler: str
) -> None:
    """A bundle that was built without draws the same as one that was built with it."""
    options: dict[str, Any] = {"seed": SEEDS, "steps": 4, "scheduler": scheduler, "size": WIDE}
    theirs = draw_with_diffusers(
        model, PROMPTS, scheduler, num_inference_steps=4, guidance_scale=guidance, height=64, width=96
    )
    for bundle in (pipe, plain):
        assert least_psnr_db(bundle(PROMPTS, guidance=guidance, **options).images, theirs) >= LEAST_PSNR_DB


def test_what_needs_guidance_is_refused_without_it(plain: toolchain.Pipeline) -> None:
    with pytest.raises(RequestError, match="negative prompt"):
        plain(PROMPTS, negative_prompt="background")
    with pytest.raises(RequestError, match="without classifier-free guidance"):
        plain(PROMPTS, guidance=5.0)
    with pytest.raises(RequestError, match="no guidance that could be rescaled"):
        plain(PROMPTS, guidance_rescale=0.5)


NEGATIVES: list[dict[str, Any]] = [
    {},
    {"negative_prompt": ["", ""]},
    {"negative_prompt": ["background", "of"]},
    {"negative_prompt": ["background", "of"], "negative_prompt_2": OTHERS},
    {"prompt_2": OTHERS},
    {"prompt_2": ["", "background"]},
    {"prompt_2": OTHERS, "negative_prompt": ["left", "a blue"], "negative_prompt_2": ["red", "circle"]},
]
OPTIONS: list[dict[str, Any]] = [
    {"clip_skip": 1},
    {"clip_skip": 2, "negative_prompt": ["left", "a blue"]},
    {"guidance_rescale": 0.7},
    {"original_size": (256, 192), "target_size": (64, 80)},
]


def drawn(pipe: toolchain.Pipeline, model: Path, options: dict[str, Any], prompts: list[str]) -> float:
    ours = pipe(prompts, seed=SEEDS[: len(prompts)], steps=4, guidance=6.0, size=(64, 64), **options).images
    renamed = {k.replace("crop_top_left", "crops_coords_top_left"): v for k, v in options.items()}
    theirs = draw_with_diffusers(
        model, prompts, "model", num_inference_steps=4, guidance_scale=6.0, height=64, width=64, **renamed
    )
    return least_psnr_db(ours, theirs)


@pytest.mark.parametrize("options", [*NEGATIVES, *OPTIONS, {"crop_top_left": (16, 8)}], ids=lambda o: ",".join(o))
def test_options(pipe: toolchain.Pipeline, model: Path, options: dict[str, Any]) -> None:
    assert drawn(pipe, model, options, PROMPTS) >= LEAST_PSNR_DB


def test_every_option_changes_the_picture(pipe: toolchain.Pipeline) -> None:
    """Else the tests above would show nothing."""
    common: dict[str, Any] = {"seed": SEEDS, "steps": 4, "guidance": 6.0, "size": (64, 64)}
    before = pipe(PROMPTS, **common).images
    for options in [*NEGATIVES[1:], *OPTIONS, {"crop_top_left": (16, 8)}]:
        assert least_psnr_db(pipe(PROMPTS, **common, **options).images, before) < 50, options


@pytest.mark.parametrize(
    "options",
    [
        {"negative_original_size": (32, 32), "negative_target_size": (64, 96)},
        {"negative_original_size": (32, 32), "negative_target_size": (64, 64), "negative_crop_top_left": (8, 24)},
        {"negative_original_size": (32, 32)},
        {"negative_target_size": (32, 32), "negative_crop_top_left": (8, 24)},
    ],
    ids=lambda o: ",".join(o),
)
def test_sizes_of_the_negative_prompt(pipe: toolchain.Pipeline, model: Path, options: dict[str, Any]) -> None:
    """One picture: of several, diffusers 0.42 interleaves the rows, and gives pictures each other's sizes."""
    assert drawn(pipe, model, options, PROMPTS[:1]) >= LEAST_PSNR_DB


def test_an_empty_second_prompt_is_the_first(pipe: toolchain.Pipeline, model: Path) -> None:
    """Where it is text; in a list, which a test above gives, it is the empty prompt."""
    options: dict[str, Any] = {"seed": SEEDS[0], "steps": 4, "guidance": 6.0, "size": (64, 64)}
    ours = pipe(PROMPTS[0], prompt_2="", **options).images
    pipeline = parity.diffusers_pipeline(model, BASE)
    assert pipeline.encode_prompt(PROMPTS[0], "")[0].equal(pipeline.encode_prompt(PROMPTS[0])[0])
    assert least_psnr_db(ours, pipe(PROMPTS[0], **options).images) == float("inf")


@pytest.mark.parametrize(
    "options", [{}, {"negative_prompt": ["", ""]}, {"negative_prompt_2": OTHERS}], ids=lambda o: ",".join(o)
)
def test_a_model_whose_empty_prompt_is_not_zeros(
    pipe_without_zeros: toolchain.Pipeline, model_without_zeros: Path, options: dict[str, Any]
) -> None:
    assert drawn(pipe_without_zeros, model_without_zeros, options, PROMPTS) >= LEAST_PSNR_DB


def test_a_second_negative_prompt_alone(
    pipe: toolchain.Pipeline, pipe_without_zeros: toolchain.Pipeline, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Where zeros stand for no negative prompt diffusers ignores it; else it counts, which the test above compares."""
    run: dict[str, Any] = {"seed": SEEDS, "steps": 4, "guidance": 6.0, "size": (64, 64)}
    plain = pipe_without_zeros(PROMPTS, **run).images
    assert least_psnr_db(pipe_without_zeros(PROMPTS, negative_prompt_2=OTHERS, **run).images, plain) < 50
    assert "has no effect" not in caplog.text
    assert drawn(pipe, model, {"negative_prompt_2": OTHERS}, PROMPTS) >= LEAST_PSNR_DB
    assert "negative_prompt_2 has no effect without negative_prompt" in caplog.text


def test_a_prompt_longer_than_the_encoders_is_cut(pipe: toolchain.Pipeline, model: Path) -> None:
    prompt = "a red circle left of " * 12 + "a blue square"
    assert drawn(pipe, model, {}, [prompt]) >= LEAST_PSNR_DB


@pytest.mark.parametrize("strength", [0.4, 0.75])
@pytest.mark.parametrize("scheduler", ["model", "ddim", "euler-a", "dpm++2m:karras", "unipc"])
def test_image_to_image(pipe: toolchain.Pipeline, model: Path, scheduler: str, strength: float) -> None:
    negative = {"negative_prompt": ["left", "of"]}
    options: dict[str, Any] = {"image": random_images(2, 64, 96), "strength": strength, **negative}
    ours = pipe(PROMPTS, seed=SEEDS, steps=5, guidance=5.0, scheduler=scheduler, **options).images
    theirs = draw_with_diffusers(
        model, PROMPTS, scheduler, FROM_IMAGE, num_inference_steps=5, guidance_scale=5.0, **options
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB


@pytest.mark.parametrize(
    "options",
    [
        {"original_size": (256, 192), "crop_top_left": (16, 8)},
        {"negative_original_size": (32, 32)},
        {"negative_original_size": (32, 32), "negative_target_size": (64, 96), "negative_crop_top_left": (8, 24)},
    ],
    ids=lambda o: ",".join(o),
)
def test_sizes_of_image_to_image(pipe: toolchain.Pipeline, model: Path, options: dict[str, Any]) -> None:
    (image,) = random_images(1, 64, 64)
    ours = pipe(PROMPTS[0], seed=SEEDS[0], steps=4, guidance=6.0, image=image, strength=0.75, **options).images
    renamed = {k.replace("crop_top_left", "crops_coords_top_left"): v for k, v in options.items()}
    reference: dict[str, Any] = {"image": image, "strength": 0.75, **renamed}
    theirs = draw_with_diffusers(
        model, PROMPTS[:1], "model", FROM_IMAGE, num_inference_steps=4, guidance_scale=6.0, **reference
    )
    assert least_psnr_db(ours, theirs) >= LEAST_PSNR_DB
