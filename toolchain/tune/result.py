"""What a tuning found, as JSON and as lines for a terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from toolchain.check.report import show
from toolchain.store.plain_json import plain
from toolchain.terminal import table
from toolchain.tune.search import Unit

if TYPE_CHECKING:
    from toolchain.recipe import Recipe
    from toolchain.tune.pictures import Measured, Pixels

SCHEMA = 1


@dataclass(frozen=True)
class Trial:
    """An option with everything quantised, and the error of the component's output: noise over signal."""

    component: str
    key: str
    value: Any
    error: float


@dataclass(frozen=True)
class Point:
    """A candidate that was built and drew pictures.

    excluded  how many units are left as they are, the dearest first
    share     of a picture's multiply-accumulates in the smaller type
    """

    excluded: int
    share: float
    measured: Measured

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        facts = {"excluded": self.excluded, "share": self.share, **self.measured.summary}
        return {**facts, "step_ms": self.measured.step_ms}


@dataclass(frozen=True)
class Overflow:
    """A module that leaves the range of its component's type.

    largest  the largest magnitude of what it and the modules in it take and give; None where only a value within it
             is too large, which no module gives
    kept     what the recipe says now: the module in `keep_float32`, or another type of the whole component
    """

    component: str
    module: str
    largest: float | None
    kept: str


@dataclass(frozen=True, kw_only=True)
class Tuned:
    """What was tried, what was chosen, and what that reaches.

    units      in the order of their exclusion; the first `chosen.excluded` are left as they are
    alone      component -> its pictures with nothing else quantised
    naive      everything with the largest ranges and scales; and the same with the chosen exclusions
    held_out   the chosen recipe with other seeds
    reference_step_ms  of the unquantised engines
    least_psnr_db      of the pictures of the recipe's check, against diffusers'
    reference  the unquantised pictures [N, H, W, 3]; not in the JSON
    text       of the recipe's file
    """

    recipe: Recipe
    model: str
    backend: str
    budget: Mapping[str, float]
    prompts: int
    seeds: tuple[int, ...]
    trials: tuple[Trial, ...] = ()
    units: tuple[Unit, ...] = ()
    alone: Mapping[str, Measured] = field(default_factory=dict)
    points: tuple[Point, ...] = ()
    chosen: Point | None = None
    naive: tuple[Point, ...] = ()
    held_out: Measured | None = None
    reference_step_ms: float = 0.0
    overflows: tuple[Overflow, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    least_psnr_db: float | None = None
    reference: Pixels | None = None
    text: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by the rule of `toolchain.store.plain_json`."""
        document = {
            "schema": SCHEMA,
            "recipe": self.recipe.to_json(),
            "model": self.model,
            "backend": self.backend,
            "budget": dict(self.budget),
            "prompts": self.prompts,
            "seeds": self.seeds,
            "trials": [asdict(trial) for trial in self.trials],
            "alone": {name: measured.summary for name, measured in self.alone.items()},
            "units": [asdict(unit) for unit in self.units],
            "points": [point.to_json() for point in self.points],
            "chosen": None if self.chosen is None else self.chosen.to_json(),
            "naive": [point.to_json() for point in self.naive],
            "held_out": None if self.held_out is None else self.held_out.summary,
            "reference_step_ms": self.reference_step_ms,
            "least_psnr_db": self.least_psnr_db,
            "overflows": [asdict(overflow) for overflow in self.overflows],
            "versions": dict(self.versions),
        }
        return dict(plain(document))

    def lines(self) -> Iterator[str]:
        """For a terminal: what was kept in float32, the options, the curve, what was chosen and what it reaches."""
        for overflow in self.overflows:
            yield f"{overflow.component}: {overflow.kept}, {overflow_words(overflow)}"
        if self.chosen is None:
            if not self.overflows:
                yield "every value stays in the range of its type: the recipe is as it was"
            return
        for name, measured in self.alone.items():
            yield f"{name} alone: {_words(measured)}"
        rows = [[str(p.excluded), f"{p.share:.1%}", *_cells(p), mark] for p, mark in self._curve()]
        head = ["excluded", "share", "PSNR dB least", "median", "SSIM least", "step ms", ""]
        yield from table(rows, head=head, indent="")
        assert self.held_out is not None
        yield f"chosen: {self.chosen.excluded} of {len(self.units)} left as they are, {_words(self.chosen.measured)}"
        yield f"with other seeds: {_words(self.held_out)}"
        yield f"the recipe's check, against diffusers: PSNR {self.least_psnr_db:.1f} dB at least"
        yield self.speed()

    def speed(self) -> str:
        """How long a step took against the unquantised engine's, in plain words: another time, maybe another load."""
        assert self.chosen is not None
        ratio = self.reference_step_ms / self.chosen.measured.step_ms
        took = f"{self.chosen.measured.step_ms:.3g} ms a step, unquantised {self.reference_step_ms:.3g} ms"
        verdict = f"{ratio:.2f} times as fast" if ratio > 1 else "not faster on this machine"
        return f"{took}: {verdict}, one drawn after the other (the gate of a build times both in turn)"

    def _curve(self) -> list[tuple[Point, str]]:
        """What was drawn, and what it is. A candidate equals its naive one where the largest ranges and scales won."""
        candidates = [(p, "chosen" if p is self.chosen else "") for p in self.points]
        naive = [(p, "largest ranges and scales") for p in self.naive]
        return sorted([*candidates, *naive], key=lambda row: row[0].excluded)


def overflow_words(overflow: Overflow) -> str:
    """How far a module goes."""
    if overflow.largest is None:
        return "a value inside it leaves the range of the type"
    return f"values of up to {overflow.largest:.4g}"


def _words(measured: Measured) -> str:
    summary = measured.summary
    text = f"PSNR {summary['psnr_db']:.1f} dB at least, median {summary['median_psnr_db']:.1f} dB"
    return text + (f", cosine {show(summary['cosine'])}" if "cosine" in summary else "")


def _cells(point: Point) -> list[str]:
    summary = point.measured.summary
    numbers = [f"{summary['psnr_db']:.1f}", f"{summary['median_psnr_db']:.1f}", show(summary["ssim"])]
    return [*numbers, f"{point.measured.step_ms:.3g}"]
