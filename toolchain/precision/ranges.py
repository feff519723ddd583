"""How large the activations get that quantised weights are multiplied with, as seen along a trajectory.

Seen is kept apart for every step, since a denoiser's activations change their size from noise to picture, and so the
method that turns it into one scale can be chosen afterwards.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

OCTAVE = 32
"""Bins of a histogram for every doubling: a percentile is off by 2.2 % at most."""
SHIFT = 23 - 5
"""Bits of a float32's mantissa that a bin does not look at: log2(OCTAVE) of its 23 are kept."""
BINS = 255 * OCTAVE
"""All finite magnitudes of float32."""
FORM = re.compile(r"(max|mean)|(percentile|first_steps)=(\d+(?:\.\d+)?)")
EXPECTED = '"max", "mean", "percentile=P" with 50 < P <= 100, or "first_steps=SHARE" with 0 < SHARE <= 1'


@dataclass(frozen=True)
class Range:
    """Of one activation: the input of a convolution or matrix product.

    peaks   float32 [steps, channels]: the largest magnitude in a channel over all calls of a step. Channels are axis 1
            of a convolution's input and the last axis of a product's
    means   float32 [steps]: the largest magnitude of a call, averaged over the calls of a step
    counts  int64 [BINS]: the histogram of a sample of all calls, see `histogram`
    """

    peaks: NDArray[np.float32]
    means: NDArray[np.float32]
    counts: NDArray[np.int64]

    def largest(self, method: str) -> float:
        """The magnitude that the largest integer stands for. `method` is one that `parse_method` takes."""
        return parse_method(method)(self)

    @property
    def channels(self) -> NDArray[np.float32]:
        """float32 [channels]: the largest magnitude in each channel over all steps."""
        peaks: NDArray[np.float32] = self.peaks.max(axis=0)
        return peaks


Ranges = Mapping[str, Range]
"""By the name in the checkpoint of the weight that the activation is multiplied with."""


def parse_method(text: str) -> Callable[[Range], float]:
    """How a scale is chosen, from its form in a recipe. ValueError for any other text.

    max            the largest magnitude that was seen
    mean           the average over all steps of the average largest magnitude of a call
    percentile=P   the magnitude that P percent of all values do not exceed
    first_steps=S  the largest magnitude in the first share S of the steps, where a picture's layout is decided
    """
    match = FORM.fullmatch(text)
    number = float(match[3]) if match and match[3] else 1.0
    kind = (match[1] or match[2]) if match else None
    if kind == "max":
        return lambda seen: float(seen.peaks.max())
    if kind == "mean":
        return lambda seen: float(seen.means.mean())
    if kind == "percentile" and 50 < number <= 100:
        return lambda seen: _percentile(seen, number)
    if kind == "first_steps" and 0 < number <= 1:
        return lambda seen: float(seen.peaks[: int(np.ceil(number * len(seen.peaks)))].max())
    raise ValueError(f"expected {EXPECTED}")


def _percentile(seen: Range, percent: float) -> float:
    """The upper edge of the bin with the percentile; never more than the largest value seen."""
    total = np.cumsum(seen.counts)
    index = int(np.searchsorted(total, percent / 100 * total[-1]))
    return min(bin_edge(index + 1), float(seen.peaks.max()))


def histogram(values: NDArray[Any]) -> NDArray[np.int64]:
    """int64 [BINS]: how many finite float32 `values` have each magnitude, on a scale of OCTAVE bins for a doubling."""
    bits = np.ascontiguousarray(values, dtype=np.float32).reshape(-1).view(np.uint32) & 0x7FFFFFFF
    return np.bincount(bits >> SHIFT, minlength=BINS)[:BINS].astype(np.int64)


def bin_edge(index: int) -> float:
    """The least magnitude of bin `index`; inf for the one after the last."""
    return float(np.array(index << SHIFT, np.uint32).view(np.float32))
