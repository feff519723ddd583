"""Whole pictures: the bundle against the diffusers pipeline, same prompts, seeds, scheduler, steps and guidance."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.metrics import structural_similarity

from toolchain.bundle.bundle import Bundle
from toolchain.check.flip import mean_flip
from toolchain.check.reference import reference_pipeline, reference_scheduler, text_length
from toolchain.check.report import Pair, Picture
from toolchain.models.component import Family
from toolchain.models.source import ModelSource
from toolchain.runtime.pipeline import Pipeline
from toolchain.sampler.schedulers import parse, reference_kwargs
from toolchain.sampler.silence import quiet

Pixels = NDArray[np.uint8]
BLANK_LEVELS = 2
"""A picture in which no channel spans more levels than this is blank: rounding alone may make this much."""


@dataclass(frozen=True)
class CompiledPicture:
    """A picture [H, W, 3] that the bundle drew; `finite` says whether its latents held no NaN or infinity."""

    prompt: str
    seed: int
    pixels: Pixels
    finite: bool


def draw(pipeline: Pipeline, progress: Callable[[str], None]) -> list[CompiledPicture]:
    """Every prompt with every seed of the recipe's check, at every size of the bundle, with the recipe's defaults."""
    recipe = pipeline.bundle.recipe
    pairs = [(prompt, seed) for prompt in recipe.check.prompts for seed in recipe.check.seeds]
    drawn = []
    for size in dict.fromkeys((b.height, b.width) for b in pipeline.bundle.buckets):
        progress(f"pictures {size[0]}x{size[1]}: {len(pairs)} from the bundle")
        result = pipeline([p for p, _ in pairs], seed=[s for _, s in pairs], size=size)
        for (prompt, seed), image, latents in zip(pairs, result.images, result.latents, strict=True):
            drawn.append(CompiledPicture(prompt, seed, np.asarray(image), bool(np.isfinite(latents).all())))
    return drawn


def compare_pictures(
    bundle: Bundle, source: ModelSource, family: Family, drawn: list[CompiledPicture], progress: Callable[[str], None]
) -> tuple[list[Picture], list[str]]:
    """Each picture against the reference's, which are drawn one at a time; and how the reference differs from what
    diffusers loads and calls by default. ModelError when it cannot be loaded."""
    progress("pictures: loading the reference pipeline")
    recipe = bundle.recipe
    pipeline, changes = reference_pipeline(source, family, recipe)
    spec = parse(recipe.sampling.scheduler)
    changes.append(f"{recipe.sampling.steps} steps at guidance {bundle.default_guidance:g}, the recipe's")
    loaded = pipeline.scheduler
    scheduler = reference_scheduler(loaded, spec)
    if scheduler is not loaded:
        names = [type(s).__name__ for s in (scheduler, loaded)]
        changes.append(f"the scheduler {spec.canonical}, a {names[0]}, in place of the model's {names[1]}")
    tokens = text_length(source, family, recipe)
    changes += [f"{name} = {value}, the recipe's" for name, value in tokens.items()]
    kwargs = reference_kwargs(spec) | tokens
    pictures = []
    for number, one in enumerate(drawn):
        progress(f"pictures: {number + 1} of {len(drawn)} from the reference")
        pipeline.scheduler = copy.deepcopy(scheduler)  # a trajectory uses a scheduler up
        reference = _reference(pipeline, one, bundle, kwargs)
        pictures.append(judge(one, reference, recipe.picture_limits))
    return pictures, changes


def judge(drawn: CompiledPicture, reference: Pixels, limits: Mapping[str, float]) -> Picture:
    """One picture against the reference's of the same size, both 8-bit [H, W, 3]; `limits` are the recipe's."""
    pair = Pair(reference, drawn.pixels)
    psnr = pair.psnr_db
    ssim = similarity(reference, drawn.pixels)
    verdicts = {
        "psnr_db": psnr >= limits["psnr_db"],
        "ssim": ssim >= limits["ssim"],
        "finite": drawn.finite,
        "not blank": is_blank(reference) or not is_blank(drawn.pixels),
    }
    size = f"{reference.shape[0]}x{reference.shape[1]}"
    failed = tuple(name for name, passed in verdicts.items() if not passed)
    return Picture(drawn.prompt, drawn.seed, size, psnr, ssim, failed, pair, mean_flip(reference, drawn.pixels))


def similarity(reference: Pixels, pixels: Pixels) -> float:
    """Structural similarity of two pictures [H, W, 3] of one size."""
    return float(structural_similarity(reference, pixels, channel_axis=-1, data_range=255))


def is_blank(pixels: Pixels) -> bool:
    """Whether a picture [H, W, 3] is black or of one other colour throughout."""
    return int(np.ptp(pixels, axis=(0, 1)).max()) <= BLANK_LEVELS


def _reference(pipeline: Any, drawn: CompiledPicture, bundle: Bundle, kwargs: dict[str, Any]) -> Pixels:
    import torch

    with quiet():
        result = pipeline(
            drawn.prompt,
            height=drawn.pixels.shape[0],
            width=drawn.pixels.shape[1],
            num_inference_steps=bundle.recipe.sampling.steps,
            guidance_scale=bundle.default_guidance,
            generator=torch.Generator("cpu").manual_seed(drawn.seed),
            output_type="pil",
            **kwargs,
        )
    return np.asarray(result.images[0])
