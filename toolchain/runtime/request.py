"""What one call asks for, filled in and checked before anything runs."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import RequestError
from toolchain.sampler.table import MAX_EVALUATIONS, SamplerTable

F32 = NDArray[np.float32]


@dataclass(frozen=True)
class Request:
    """One call with everything filled in and checked. `latents` [N, C, h, w] standard normal, or None."""

    prompts: list[str]
    negatives: list[str]
    seeds: list[int]
    table: SamplerTable
    guidance: float
    size: tuple[int, int]
    latents: F32 | None


def check_texts(name: str, value: str | Sequence[str]) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise RequestError(f"{name} is not text", expected="a string or a list of strings", got=repr(value)[:80])
    if not texts:
        raise RequestError(f"{name} is an empty list", expected="at least one string", got=value)
    return list(texts)


def check_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    if seed is None:
        seed = secrets.randbits(32)
    seeds = [seed + i for i in range(count)] if type(seed) is int else seed
    expected = "an integer from 0 to 2**64 - 1, or one for each prompt"
    if not isinstance(seeds, list | tuple) or not all(type(s) is int and 0 <= s < 2**64 for s in seeds):
        raise RequestError("seed is not a seed", expected=expected, got=repr(seed)[:80])
    if len(seeds) != count:
        raise RequestError("as many seeds as prompts are needed", expected=count, got=len(seeds))
    return list(seeds)


def check_latents(latents: F32 | None) -> F32 | None:
    if latents is None:
        return None
    if (
        not isinstance(latents, np.ndarray)
        or latents.dtype != np.float32
        or latents.ndim != 4
        or not np.isfinite(latents).all()
    ):
        raise RequestError(
            "latents are not latents",
            expected="a finite float32 array [N, C, h, w]",
            got=f"{type(latents).__name__} {getattr(latents, 'dtype', '')} {getattr(latents, 'shape', '')}",
        )
    return latents


def check_steps(steps: int) -> int:
    if type(steps) is not int or not 1 <= steps <= MAX_EVALUATIONS:
        expected = f"an integer from 1 to {MAX_EVALUATIONS}"
        raise RequestError("steps is not a number of steps", expected=expected, got=repr(steps))
    return steps


def check_guidance(guidance: float, guided: bool) -> float:
    """The scale to run with; `guided` tells whether the bundle was built with classifier-free guidance."""
    if isinstance(guidance, bool) or not isinstance(guidance, int | float) or not math.isfinite(guidance):
        raise RequestError("guidance is not a number", expected="a finite number", got=repr(guidance))
    if guidance > 1 and not guided:
        raise RequestError(
            "the bundle was built without classifier-free guidance",
            expected="guidance of 1 or less",
            got=guidance,
            hint="set classifier_free_guidance = true in the recipe and build again",
        )
    return max(1.0, float(guidance))
