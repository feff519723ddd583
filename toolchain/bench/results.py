"""The results of a benchmark, as JSON and as a table. Imports nothing heavy."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from toolchain.store.plain_json import plain

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

STAGES = ("tokenize_ms", "text_ms", "denoise_ms", "decode_ms", "overhead_ms")


@dataclass(frozen=True)
class Spread:
    """Of the rounds: the median, and the tenth and ninetieth percentile."""

    median: float
    p10: float
    p90: float


@dataclass(frozen=True)
class ContenderResult:
    """One contender. `start` is its cold start by part; `stages` and `total` are of the rounds, in milliseconds.

    peak_mb is resident memory, pages of mapped weight files included, and grown_mb how much of it came with the
    engines, where that is known. gpu_mb is what came onto the GPU until the first picture, and stays there.
    """

    start: Mapping[str, float]
    stages: Mapping[str, Spread]
    total: Spread
    peak_mb: float | None
    counts: Mapping[str, float]
    grown_mb: float | None = None
    gpu_mb: float | None = None

    @property
    def cold_ms(self) -> float:
        """Milliseconds of the whole cold start."""
        return sum(self.start.values())


@dataclass(frozen=True)
class BenchReport:
    """Everything that `bench` measured.

    ratios       contender -> its time over ours, round by round
    likeness_db  contender -> PSNR of its first picture against ours: infinite where they are equal, None where their
                 sizes differ
    sweeps       what was varied -> points
    precisions   contender that is a bundle -> what it computes in, in words
    forecast_mb  by how much our memory, on a GPU the GPU's, should have grown, as far as the bundle knows
    pictures     contender -> its first picture, 8-bit [H, W, 3]; not in the JSON
    """

    bundle: str
    recipe: str
    workload: Mapping[str, Any]
    repeats: int
    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    contenders: Mapping[str, ContenderResult]
    ratios: Mapping[str, Sequence[float]]
    likeness_db: Mapping[str, float | None]
    sweeps: Mapping[str, Sequence[Mapping[str, Any]]]
    precisions: Mapping[str, str] = field(default_factory=dict)
    forecast_mb: float | None = None
    pictures: Mapping[str, NDArray[np.uint8]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def memory(self) -> str | None:
        """The forecast of memory beside what was measured. None where there is none."""
        ours = next(iter(self.contenders.values()))
        if self.forecast_mb is None:
            return None
        grown = ours.gpu_mb or ours.grown_mb
        if grown is None:
            return f"the forecast is {self.forecast_mb:.0f} MB; what came with the engines alone could not be told"
        error = self.forecast_mb / grown - 1
        return f"{grown:.0f} MB came with the engines; the forecast was {self.forecast_mb:.0f} MB ({error:+.1%})"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, by the rule of `toolchain.store.plain_json`."""
        ratios = {name: asdict(spread(values)) | {"rounds": list(values)} for name, values in self.ratios.items()}
        data = asdict(replace(self, pictures={}))
        del data["pictures"]
        return dict(plain({**data, "ratios": ratios}))

    def lines(self) -> Iterator[str]:
        """For the terminal."""
        work = self.workload
        yield (
            f"{work['batch']} picture(s) of {work['size']}, {work['steps']} steps, {work['scheduler']}, guidance "
            f"{work['guidance']}; {self.repeats} rounds, after one that is the cold start"
        )
        images = int(work["batch"])
        for name, result in self.contenders.items():
            yield ""
            total = result.total
            rate = images / total.median * 1e3
            memory = f", peak {result.peak_mb:.0f} MB" if result.peak_mb is not None else ""
            memory += f", on the GPU {result.gpu_mb:.0f} MB" if result.gpu_mb is not None else ""
            computes = f" ({self.precisions[name]})" if name in self.precisions else ""
            yield f"{name}{computes}: {_ms(total)} a call, {rate:.2f} images/s{memory}"
            yield "  " + ", ".join(f"{stage.removesuffix('_ms')} {_ms(s)}" for stage, s in result.stages.items())
            if "loop_overhead_ms" in result.counts:
                share = result.counts["loop_overhead_ms"] / max(result.stages["denoise_ms"].median, 1e-9)
                evaluations, launches = (int(result.counts[key]) for key in ("evaluations", "launches"))
                yield f"  {evaluations} evaluations, {launches} launches, {share:.1%} of the loop outside the engine"
            parts = ", ".join(
                f"{part.removesuffix('_ms').replace('_', ' ')} {ms:.0f}" for part, ms in result.start.items()
            )
            yield f"  cold start {result.cold_ms:.0f} ms: {parts}"
        if self.memory:
            yield ""
            yield f"memory: {self.memory}"
        for name, values in self.ratios.items():
            ratio = spread(values)
            likeness = self.likeness_db[name]
            same = alike(likeness)
            yield ""
            times = f"{ratio.median:.2f} times as long ({ratio.p10:.2f} to {ratio.p90:.2f})"
            yield f"{name} takes {times}; pictures: {same}"
        for kind, points in self.sweeps.items():
            yield ""
            yield f"{kind}: " + ", ".join(f"{point[kind]} {point['total_ms']:.0f} ms" for point in points)


def summarize(
    start: Mapping[str, float], rounds: Sequence[Mapping[str, float]], end: Mapping[str, Any]
) -> ContenderResult:
    """The result of one contender: medians of its `rounds`, cold start by part, and memory at the `end`."""
    stages = {key: spread([r[key] for r in rounds]) for key in STAGES if key in rounds[0]}
    others = [key for key in rounds[0] if key not in (*STAGES, "total_ms")]
    return ContenderResult(
        start=dict(start),
        stages=stages,
        total=spread([r["total_ms"] for r in rounds]),
        peak_mb=end["peak_mb"],
        grown_mb=end.get("grown_mb"),
        gpu_mb=end.get("gpu_mb"),
        counts={key: statistics.median(r[key] for r in rounds) for key in others},
    )


def spread(values: Sequence[float]) -> Spread:
    """Median and deciles, interpolated; all three are the value where there is one."""
    if len(values) == 1:
        return Spread(values[0], values[0], values[0])
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Spread(statistics.median(values), deciles[0], deciles[-1])


def alike(likeness_db: float | None) -> str:
    """How alike two pictures are, in words."""
    if likeness_db is None:
        return "of another size"
    return "equal" if likeness_db == math.inf else f"PSNR {likeness_db:.1f} dB"


def _ms(value: Spread) -> str:
    digits = 0 if value.median >= 100 else 1
    return f"{value.median:.{digits}f} ms ({value.p10:.{digits}f} to {value.p90:.{digits}f})"
