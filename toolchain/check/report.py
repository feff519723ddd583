"""The results of a check: numbers, limits and verdicts, as JSON and as a short table. Imports nothing heavy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.check.flip import INSTALL
from toolchain.store.files import write_atomic
from toolchain.store.plain_json import encode, plain
from toolchain.terminal import table

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Pixels = NDArray[np.uint8]

SCHEMA = 1
LISTED_FAILURES = 12
LATENTS = "next_state"
"""The denoiser's output that becomes the picture."""
AT_MOST = ("max_error", "difference")
"""The metrics that count errors; the others count likeness, and their limits are the least that will do."""


@dataclass(frozen=True)
class Metrics:
    """How far an output is from the reference's, or how far it may be. None where a metric does not apply.

    cosine      cosine similarity of the flattened tensors, at least
    snr_db      reference's power over the power of the difference, at least; inf where nothing differs
    max_error   largest absolute difference relative to the reference's largest magnitude, at most
    difference  largest absolute difference of integers (levels of 255 for pixels), at most
    """

    cosine: float | None = None
    snr_db: float | None = None
    max_error: float | None = None
    difference: float | None = None

    def named(self) -> dict[str, float]:
        """The metrics that apply."""
        return {f.name: v for f in fields(self) if (v := getattr(self, f.name)) is not None}


@dataclass(frozen=True)
class Entry:
    """One output of one component on one input.

    bucket  "1x64x64", or "any" where the component is the same for all of them
    input   a label of the input, such as "prompt 1, evaluation 10 of 20"
    failed  the metrics that miss their limit, and "finite" where the engine's output holds NaN or infinity
    evaluation  which one of a trajectory, counted from 1; None for what is not a denoiser's
    note    what to change in the recipe where it failed, or why it failed; "" where that is unknown
    """

    component: str
    bucket: str
    input: str
    output: str
    metrics: Metrics
    limits: Metrics
    failed: tuple[str, ...]
    evaluation: int | None = None
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every metric is within its limit and the output is finite."""
        return not self.failed

    @property
    def margin_db(self) -> float:
        """Distance to the nearest limit as a ratio of error powers, negative where one is missed; -inf for NaN."""
        measured = self.metrics.named()
        margins = [_margin_db(name, measured[name], limit) for name, limit in self.limits.named().items()]
        return min(margins) if "finite" not in self.failed else -math.inf

    def describe(self) -> str:
        """One line: where, what was measured and, where it failed, what was needed."""
        return f"{self.component} {self.bucket}, {self.input}, {self.output}: {self.numbers()}"

    def numbers(self) -> str:
        """What was measured and, where it failed, what was needed."""
        numbers = _numbers(self.metrics.named(), self.limits.named(), self.failed)
        return f"{numbers}; {self.note}" if self.note else numbers

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by the rule of `toolchain.store.plain_json`."""
        named = {"metrics": self.metrics.named(), "limits": self.limits.named()}
        return dict(plain({**asdict(self), **named, "passed": self.passed}))


@dataclass(frozen=True, eq=False)
class Pair:
    """The pixels of two pictures of one size, each 8-bit [H, W, 3]."""

    reference: Pixels
    compiled: Pixels

    @property
    def psnr_db(self) -> float:
        """Peak signal-to-noise ratio; infinite where they are equal."""
        import numpy as np

        error = float(np.square(self.reference.astype(np.float64) - self.compiled).mean())
        return 10 * math.log10(255**2 / error) if error else math.inf


@dataclass(frozen=True)
class Picture:
    """One whole picture against the diffusers pipeline's, both in 8 bits. `size` is "HEIGHTxWIDTH" in pixels.

    psnr_db  inf where both are identical
    failed   of "psnr_db", "ssim", "finite" (the latents hold NaN or infinity), "not blank" (one colour throughout,
             where the reference is not)
    pixels   of both, for the HTML report; not in the JSON
    flip     mean FLIP error, 0 to 1, which has no limit; None where it was not measured
    clip     CLIP scores, 100 at most, of the reference and of the compiled one; None where no model for them was given
    """

    prompt: str
    seed: int
    size: str
    psnr_db: float
    ssim: float
    failed: tuple[str, ...]
    pixels: Pair | None = field(default=None, repr=False, compare=False)
    flip: float | None = None
    clip: tuple[float, float] | None = None

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return not self.failed

    def describe(self, limits: Mapping[str, float]) -> str:
        """One line: which picture, what was measured and, where it failed, what was needed."""
        numbers = _numbers({"psnr_db": self.psnr_db, "ssim": self.ssim}, limits, self.failed)
        return f"picture {self.size}, seed {self.seed}, {self.prompt!r}: {numbers}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by the rule of `toolchain.store.plain_json`."""
        return {
            "prompt": self.prompt,
            "seed": self.seed,
            "size": self.size,
            "psnr_db": plain(self.psnr_db),
            "ssim": plain(self.ssim),
            "flip": self.flip,
            "clip": None if self.clip is None else {"reference": self.clip[0], "compiled": self.clip[1]},
            "failed": [*self.failed],
            "passed": self.passed,
        }


@dataclass(frozen=True)
class CheckReport:
    """All results of one check. A failed gate is a result, not an error.

    model     what the user gave as the model, and the hub commit it was resolved to
    warnings  what makes the numbers less meaningful, or explains why they are bad
    versions  of the packages that were used
    limits    of the pictures: psnr_db and ssim, at least
    changes   how the reference pipeline differs from what diffusers loads and calls by default
    """

    bundle: str
    recipe: str
    model: str
    revision: str | None
    backend: str
    device: Mapping[str, Any]
    versions: Mapping[str, str]
    warnings: tuple[str, ...]
    entries: tuple[Entry, ...]
    pictures: tuple[Picture, ...]
    limits: Mapping[str, float]
    changes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        """Whether every comparison and every picture passed."""
        return all(e.passed for e in self.entries) and all(p.passed for p in self.pictures)

    def worst_first(self) -> list[Entry]:
        """Every entry, the one furthest beyond or nearest to its limits first."""
        return sorted(self.entries, key=lambda e: (e.passed, e.margin_db))

    def worst_pictures_first(self) -> list[Picture]:
        """Every picture, failed ones first, then by PSNR; NaN is worse than any number."""
        return sorted(self.pictures, key=lambda p: (p.passed, -math.inf if math.isnan(p.psnr_db) else p.psnr_db))

    def failures(self) -> list[str]:
        """A line for everything that failed: comparisons, then pictures, the worst first."""
        failed = [e.describe() for e in self.worst_first() if not e.passed]
        return failed + [p.describe(self.limits) for p in self.worst_pictures_first() if not p.passed]

    def grouped(self) -> dict[tuple[str, str, str], list[Entry]]:
        """Entries by component, bucket and output in the order of the check; in each group the worst first."""
        groups: dict[tuple[str, str, str], list[Entry]] = {(e.component, e.bucket, e.output): [] for e in self.entries}
        for entry in self.worst_first():
            groups[entry.component, entry.bucket, entry.output].append(entry)
        return groups

    def by_evaluation(self) -> dict[str, dict[int, dict[str, float]]]:
        """ "denoiser BUCKET" -> evaluation -> the worst cosine and SNR of the latents over all trajectories."""
        groups: dict[str, dict[int, list[Entry]]] = {}
        for entry in self.entries:
            if entry.evaluation is not None and entry.output == LATENTS:
                group = groups.setdefault(f"{entry.component} {entry.bucket}", {})
                group.setdefault(entry.evaluation, []).append(entry)
        return {name: {number: worst(by[number]) for number in sorted(by)} for name, by in groups.items()}

    def verdict(self) -> str:
        """One line: passed or FAILED, and how many comparisons."""
        results = [*(e.passed for e in self.entries), *(p.passed for p in self.pictures)]
        failed = results.count(False)
        return f"FAILED: {failed} of {len(results)} comparisons" if failed else f"passed: {len(results)} comparisons"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by the rule of `toolchain.store.plain_json`."""
        data = {f.name: getattr(self, f.name) for f in fields(self)}
        worst = self.worst_first()[:1]
        return {
            "schema": SCHEMA,
            "passed": self.passed,
            **data,
            "device": dict(self.device),
            "versions": dict(self.versions),
            "warnings": [*self.warnings],
            "changes": [*self.changes],
            "worst": worst[0].to_json() if worst else None,
            "entries": [e.to_json() for e in self.entries],
            "pictures": [p.to_json() for p in self.pictures],
            "limits": plain(self.limits),
            "steps": self.steps_json(),
            "summary": self._summaries(),
        }

    def steps_json(self) -> dict[str, list[dict[str, Any]]]:
        """`by_evaluation` as JSON."""
        return {
            name: [{"evaluation": number, **plain(metrics)} for number, metrics in by.items()]
            for name, by in self.by_evaluation().items()
        }

    def save(self, path: Path) -> None:
        """Writes `to_json` in one step. StoreError when it cannot be written."""
        write_atomic(path, f"{encode(self.to_json())}\n".encode())

    def lines(self) -> list[str]:
        """For a terminal: the worst of each metric by component, bucket and output, the pictures, and what failed."""
        lines = [f"{self.bundle} (recipe {self.recipe}, {self.backend}) against {self.model}"]
        if self.changes:
            lines.append(f"the reference is the pipeline as diffusers loads it, but {'; '.join(self.changes)}")
        lines += [f"warning: {warning}" for warning in self.warnings]
        rows: list[tuple[str, ...]] = []
        for key, group in self.grouped().items():
            numbers = _numbers(worst(group), {}, ())
            rows.append((*key, str(len(group)), numbers, "passed" if all(e.passed for e in group) else "FAILED"))
        head = ("component", "bucket", "output", "inputs", "worst", "")
        lines += table(rows, head=head, indent="") if rows else []
        for name, label in (("psnr_db", "PSNR dB"), ("ssim", "SSIM")):
            spread = self._summary(name)
            if spread["min"] is not None:
                need = f"at least {show(self.limits[name])}"
                lines.append(
                    f"{len(self.pictures)} pictures, {label}: min {show(spread['min'])}, "
                    f"median {show(spread['median'])} ({need})"
                )
        if flip := self._flip():
            lines.append(f"{len(self.pictures)} pictures, FLIP: max {show(flip['max'])}, median {show(flip['median'])}")
        elif self.pictures:
            lines.append(f"FLIP was not measured ({INSTALL})")
        if clip := self._clip():
            scores = f"median {show(clip['compiled'])}, the reference's {show(clip['reference'])}"
            lines.append(f"{len(self.pictures)} pictures, CLIP score: {scores}")
        failed = self.failures()
        more = len(failed) - LISTED_FAILURES
        lines += [f"failed: {text}" for text in failed[:LISTED_FAILURES]]
        return [*lines, *([f"failed: {more} more, all in the JSON report"] if more > 0 else []), self.verdict()]

    def _summaries(self) -> dict[str, Any]:
        spread = {name: self._summary(name) for name in ("psnr_db", "ssim")}
        return {**spread, "flip": self._flip() or None, "clip": self._clip() or None}

    def _summary(self, name: str) -> dict[str, Any]:
        values = [getattr(p, name) for p in self.pictures]
        if not values:
            return {"min": None, "median": None}
        return {"min": plain(min(values)), "median": plain(statistics.median(values))}

    def _flip(self) -> dict[str, float]:
        """The largest and the median; empty where it was not measured."""
        values = [p.flip for p in self.pictures if p.flip is not None]
        return {"max": max(values), "median": statistics.median(values)} if values else {}

    def _clip(self) -> dict[str, float]:
        """The medians of both sides; empty where they were not measured."""
        scores = [p.clip for p in self.pictures if p.clip is not None]
        sides = ("reference", "compiled")
        return {side: statistics.median(values) for side, values in zip(sides, zip(*scores, strict=True), strict=False)}


def worst(entries: Iterable[Entry]) -> dict[str, float]:
    """The worst value of each metric over entries that have the same metrics; NaN is worse than any number."""
    values: dict[str, list[float]] = {}
    for entry in entries:
        for name, value in entry.metrics.named().items():
            values.setdefault(name, []).append(value)
    return {
        name: math.nan if any(map(math.isnan, numbers)) else (max if name in AT_MOST else min)(numbers)
        for name, numbers in values.items()
    }


def _margin_db(name: str, value: float, limit: float) -> float:
    if math.isnan(value):
        return -math.inf
    if name == "snr_db":
        return value - limit
    if name == "difference" and value <= limit:
        return math.inf  # one level is what rounding does: no measure of how close the values are
    # 1 - cosine grows with the square of the error, as powers do.
    error, allowed, decibels = (1 - value, 1 - limit, 10) if name == "cosine" else (value, limit, 20)
    if error <= 0 or allowed <= 0 or math.isinf(error):
        return math.inf if error <= allowed else -math.inf
    return decibels * (math.log10(allowed) - math.log10(error))


def _numbers(values: Mapping[str, float], limits: Mapping[str, float], failed: Iterable[str]) -> str:
    parts = []
    for name, value in values.items():
        side = "at most" if name in AT_MOST else "at least"
        need = f" ({side} {show(limits[name])})" if name in failed else ""
        parts.append(f"{name} {show(value)}{need}")
    return ", ".join([*parts, *(f"not {name}" if name == "finite" else name for name in failed if name not in values)])


def show(value: float | str) -> str:
    """A number in four digits, or seven just below 1."""
    if isinstance(value, str):
        return value
    return f"{value:.7g}" if 0.99 < value < 1 else f"{value:.4g}"
