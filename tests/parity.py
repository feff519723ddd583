"""What the parity tests share: the picture that diffusers draws, and how alike two pictures are."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import toolchain
from toolchain.sampler.schedulers import create, parse, reference_kwargs

LEAST_PSNR_DB = 60.0
PROMPTS = ["a red circle on a white background", "a blue square"]
OTHERS = ["a blue square left of a red circle", "background"]
SEEDS = [3, 9]
Build = Callable[[str, Path, str], toolchain.Pipeline]
"""The fixture `build`: a name, a model and the text of a recipe become a loaded bundle."""


@functools.cache
def diffusers_pipeline(model: Path, kind: str) -> Any:
    """`kind` is the name of a pipeline's class. What the model has none of is left out."""
    import diffusers
    import torch

    index = json.loads((model / "model_index.json").read_text())
    absent = {name: None for name, entry in index.items() if entry == [None, None]}
    pipeline = getattr(diffusers, kind).from_pretrained(model, dtype=torch.float32, **absent)
    pipeline.set_progress_bar_config(disable=True)
    if not hasattr(pipeline.text_encoder, "text_model"):
        # diffusers 0.42 looks for the final layer norm, which clip skip needs, where transformers before 5 had it. Past
        # Module.__setattr__, which would make the encoder a child of its own.
        object.__setattr__(pipeline.text_encoder, "text_model", pipeline.text_encoder)
    return pipeline


def draw_with_diffusers(
    kind: str, model: Path, prompts: list[str], seeds: list[int] | None, scheduler: str, **kwargs: Any
) -> np.ndarray:
    """Pictures [N, H, W, 3] uint8 of the real pipeline, one generator per picture; without `seeds` from torch's own."""
    import torch

    spec = parse(scheduler)
    config = json.loads((model / "scheduler" / "scheduler_config.json").read_text())
    pipeline = diffusers_pipeline(model, kind)
    pipeline.scheduler = create(spec, config)
    generators = None if seeds is None else [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipeline(prompts, generator=generators, output_type="np", **reference_kwargs(spec), **kwargs).images
    return (images * 255).round().astype(np.uint8)


def psnr_db(a: np.ndarray, b: np.ndarray) -> float:
    error = ((a.astype(np.float64) - b.astype(np.float64)) ** 2).mean()
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def least_psnr_db(ours: Sequence[Image.Image], theirs: np.ndarray | Sequence[Image.Image]) -> float:
    return min(psnr_db(np.asarray(a), np.asarray(b)) for a, b in zip(ours, theirs, strict=True))


def random_images(count: int, height: int, width: int, seed: int = 0) -> list[Image.Image]:
    random = np.random.default_rng(seed)
    return [Image.fromarray(random.integers(0, 256, (height, width, 3), np.uint8)) for _ in range(count)]
