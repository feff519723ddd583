"""What a tuned recipe must keep: limits of whole pictures and of the denoiser's step, as the command line has them."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.check.report import show
from toolchain.errors import UsageError

METRICS = {
    "psnr_db": "least PSNR of a picture",
    "median_psnr_db": "median PSNR of the pictures",
    "ssim": "least SSIM of a picture",
    "cosine": "least cosine similarity of the denoiser's step",
}
"""Metric -> what it is. Each is a lower limit."""
EXPECTED = "METRIC>=LIMIT with one of " + ", ".join(METRICS)
AT_MOST_ONE = ("ssim", "cosine")
FORM = re.compile(r"\s*(\w+)\s*(>=|<=|=|>|<)\s*([-+.\w]+)\s*")
LPIPS = "lpips needs the weights of a network that diffbuild neither ships nor downloads"


@dataclass(frozen=True)
class Budget:
    """Metric -> the least that will do."""

    limits: Mapping[str, float]

    def missed(self, measured: Mapping[str, float]) -> list[str]:
        """A line for each limit that is not kept, of the metrics that were measured; NaN keeps none."""
        return [
            f"{name} {show(measured[name])}, at least {limit:.9g}"
            for name, limit in self.limits.items()
            if name in measured and not measured[name] >= limit
        ]

    def __str__(self) -> str:
        return ", ".join(f"{name} >= {limit:.9g}" for name, limit in self.limits.items())


def parse_budgets(texts: Sequence[str]) -> Budget:
    """METRIC>=LIMIT texts -> a Budget. UsageError with every problem."""
    limits: dict[str, float] = {}
    problems = []
    for text in texts:
        name, limit, problem = _parse(text)
        if problem is None and name in limits:
            problem = f"{name} is given twice"
        if problem:
            problems.append(f"{text!r}: {problem}")
        else:
            limits[name] = limit
    if problems:
        raise UsageError(
            "a budget cannot be used:\n    " + "\n    ".join(problems), expected=EXPECTED, hint="--budget 'psnr_db>=35'"
        )
    return Budget(limits)


def _parse(text: str) -> tuple[str, float, str | None]:
    """Metric, limit, and why the text is no budget."""
    match = FORM.fullmatch(text)
    if match is None:
        return "", 0.0, "is not of the form METRIC>=LIMIT"
    name, sign, number = match.groups()
    if name == "lpips":
        return name, 0.0, LPIPS
    if name not in METRICS:
        return name, 0.0, f"{name} is no metric"
    if sign != ">=":
        return name, 0.0, f"{name} has a lower limit: {name}>={number}"
    try:
        limit = float(number)
    except ValueError:
        return name, 0.0, f"{number} is no number"
    most = 1.0 if name in AT_MOST_ONE else 200.0
    return name, limit, None if 0 < limit <= most else f"the limit must be above 0 and at most {most:g}"


def summarise(psnr_db: Sequence[float], ssim: Sequence[float], cosine: float | None) -> dict[str, float]:
    """The metrics of a set of pictures, and of a step where it was compared."""
    step = {} if cosine is None else {"cosine": cosine}
    pictures = {"psnr_db": min(psnr_db), "median_psnr_db": statistics.median(psnr_db), "ssim": min(ssim)}
    return {**pictures, **step}
