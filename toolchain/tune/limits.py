"""The gate of a tuned recipe: what `diffbuild check` measures of it, with room for another machine's rounding."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from toolchain.builder.plan import make_plan
from toolchain.check.compare import compare
from toolchain.check.report import CheckReport, worst
from toolchain.models.source import ModelSource
from toolchain.recipe import Check, Recipe, Tolerance
from toolchain.store.artifacts import Json
from toolchain.tune.kept import Kept
from toolchain.tune.pictures import build_ungated

ROOM_DB = 3.0
"""Twice the power of the noise that was measured."""


@dataclass(frozen=True)
class Checked:
    """A check of a recipe: its pictures against diffusers', and the worst of each component.

    components  name -> metric -> value, as `report.worst`
    """

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    components: Mapping[str, Mapping[str, float]]

    @property
    def summary(self) -> dict[str, float]:
        """The metrics of budgets that are limits of a recipe's check too."""
        return {"psnr_db": min(self.psnr_db), "ssim": min(self.ssim)}


def check(recipe: Recipe, source: ModelSource, kept: Kept, progress: Callable[[str], None]) -> Checked:
    """Builds a recipe with all its buckets and checks it, once. Raises what both raise."""
    plan = make_plan(recipe, source, kept.store, gate=False)

    def measure(folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(prefix="diffbuild-") as scratch:
            progress("check: building every bucket")
            bundle = build_ungated(plan, Path(scratch) / recipe.name)
            return _summary(compare(bundle, source, progress=lambda text: progress(f"check: {text}")))

    inputs: dict[str, Json] = {
        "steps": [step.key for step in plan.steps],
        "prompts": [*recipe.check.prompts],
        "seeds": [*recipe.check.seeds],
        "sampling": recipe.to_json()["sampling"],
    }
    data = kept.document("check", inputs, measure)
    psnr, ssim = (tuple(map(float, data[name])) for name in ("psnr_db", "ssim"))
    components = {name: {k: float(v) for k, v in metrics.items()} for name, metrics in data["components"].items()}
    return Checked(psnr, ssim, components)


def _summary(report: CheckReport) -> dict[str, Any]:
    metrics: dict[str, dict[str, float]] = {}
    for (component, _, _), entries in report.grouped().items():
        for name, value in worst(entries).items():
            known = metrics.setdefault(component, {})
            pick = max if name in ("max_error", "difference") else min
            known[name] = pick(known.get(name, value), value)
    pictures = report.pictures
    return {"psnr_db": [p.psnr_db for p in pictures], "ssim": [p.ssim for p in pictures], "components": metrics}


def gated(recipe: Recipe, checked: Checked, budget: Mapping[str, float]) -> Recipe:
    """The recipe with limits that it keeps: of pictures the budget's, of quantised components what was measured."""
    quantised = [name for name, part in recipe.components.items() if part.quantize is not None]
    limits = {name: _tolerance(checked.components[name]) for name in quantised if name in checked.components}
    least_psnr, least_ssim = checked.summary["psnr_db"], checked.summary["ssim"]
    psnr = budget.get("psnr_db", max(math.floor(min(least_psnr, 99.0) - 1), 1.0))
    ssim = budget.get("ssim", min(recipe.check.ssim, max(math.floor(100 * least_ssim - 1), 1) / 100))
    components = {**recipe.check.components, **limits}
    check: Check = replace(recipe.check, psnr_db=float(psnr), ssim=float(ssim), components=components)
    return replace(recipe, check=check)


def _tolerance(metrics: Mapping[str, float]) -> Tolerance:
    """A component's limits: half of its signal-to-noise ratio, as power, may be lost."""
    largest = max(metrics["max_error"], metrics.get("difference", 0.0) / 255)
    apart = 2 * (1 - metrics["cosine"])
    return Tolerance(
        cosine=_down(1 - apart, 2 - math.floor(math.log10(max(apart, 1e-12)))),
        snr_db=float(max(math.floor(min(metrics["snr_db"], 200.0) - ROOM_DB), 1)),
        max_error=min(-_down(-1.5 * max(largest, 1e-6), 2 - math.floor(math.log10(max(largest, 1e-6)))), 1.0),
    )


def _down(value: float, digits: int) -> float:
    """Rounded downwards, to so many digits behind the point."""
    return float(math.floor(value * 10**digits) / 10**digits)
