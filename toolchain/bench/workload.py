"""What every contender of a benchmark draws."""

from __future__ import annotations

from dataclasses import dataclass

from toolchain.bundle.bundle import Bundle
from toolchain.errors import UsageError


@dataclass(frozen=True)
class Workload:
    """What every contender draws: `batch` pictures of one prompt at `size` (height, width), seeds counting up."""

    prompt: str
    batch: int
    size: tuple[int, int]
    steps: int
    scheduler: str
    guidance: float
    seed: int = 0


def workload(
    bundle: Bundle, prompt: str | None, batch: int, size: tuple[int, int] | None, steps: int | None
) -> Workload:
    """The recipe's defaults where nothing is said. UsageError for a size that was not built."""
    first, sampling = bundle.buckets[0], bundle.recipe.sampling
    chosen = size or (first.height, first.width)
    built = sorted({(b.height, b.width) for b in bundle.buckets})
    if chosen not in built:
        sizes = ", ".join(f"{h}x{w}" for h, w in built)
        raise UsageError("no engine was built for this size", expected=sizes, got=f"{chosen[0]}x{chosen[1]}")
    return Workload(
        prompt=prompt or bundle.recipe.check.prompts[0],
        batch=batch,
        size=chosen,
        steps=steps or sampling.steps,
        scheduler=sampling.scheduler,
        guidance=bundle.default_guidance,
    )
