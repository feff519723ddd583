"""What the output of a watched graph says, launch after launch, added up to ranges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.precision.ranges import BINS, Range, Ranges, histogram

WATCHED = "watched"
"""The output that `watch` adds to a graph."""


@dataclass(frozen=True)
class Watched:
    """An activation and its part of the output: peaks, then samples.

    weights   the weights that it is multiplied with, by their names in the checkpoint
    channels  how many peaks are its
    samples   how many samples
    """

    weights: tuple[str, ...]
    channels: int
    samples: int


class Collector:
    """The ranges of one graph's activations so far. Its size depends on the graph and the number of steps alone."""

    def __init__(self, watched: Sequence[Watched]) -> None:
        self.watched = tuple(watched)
        self.size = sum(w.channels + w.samples for w in watched)
        self._channels = np.concatenate([[0], np.cumsum([w.channels for w in watched])]).astype(np.int64)
        self._peaks = np.zeros((0, self._channels[-1]), np.float32)
        self._sums = np.zeros((0, len(watched)))
        self._calls = np.zeros(0, np.int64)
        self._counts = np.zeros((len(watched), BINS), np.int64)

    def add(self, step: int, values: NDArray[np.float32]) -> None:
        """One launch in step `step`: float32 [size], the output that `watch` added."""
        if (missing := step + 1 - len(self._calls)) > 0:
            grown = [np.pad(a, [(0, missing)] + [(0, 0)] * (a.ndim - 1)) for a in (self._peaks, self._sums)]
            self._peaks, self._sums = grown
            self._calls = np.pad(self._calls, (0, missing))
        self._calls[step] += 1
        at = 0
        for number, w in enumerate(self.watched):
            peaks, samples = values[at : at + w.channels], values[at + w.channels : at + w.channels + w.samples]
            at += w.channels + w.samples
            if not np.isfinite(samples).all():  # a maximum leaves NaN out
                peaks = np.full_like(peaks, np.inf)
            seen = self._peaks[step, self._channels[number] : self._channels[number + 1]]
            np.maximum(seen, peaks, out=seen)
            self._sums[step, number] += peaks.max()
            self._counts[number] += histogram(samples)

    def overflowing(self) -> list[str]:
        """The weights whose activations were not finite."""
        parts = zip(self.watched, self._channels, self._channels[1:], strict=False)
        return [w.weights[0] for w, first, end in parts if not np.isfinite(self._peaks[:, first:end]).all()]

    def ranges(self) -> Ranges:
        """Of every weight; those that are multiplied with one activation share its range.

        A step that no launch was in, and a graph that never ran, are our own mistakes.
        """
        assert len(self._calls) > 0
        assert self._calls.all()
        means = (self._sums / self._calls[:, None]).astype(np.float32)
        ranges: dict[str, Range] = {}
        for number, (w, first, end) in enumerate(zip(self.watched, self._channels, self._channels[1:], strict=False)):
            seen = Range(self._peaks[:, first:end], means[:, number], self._counts[number])
            for name in w.weights:
                ranges[name] = joined(ranges[name], seen) if name in ranges else seen
        return ranges

    def state(self) -> dict[str, NDArray[Any]]:
        """What `restore` goes on from."""
        return {"peaks": self._peaks, "sums": self._sums, "calls": self._calls, "counts": self._counts}

    def restore(self, state: Mapping[str, NDArray[Any]]) -> None:
        """Takes the `state` of a collector of the same graph. KeyError and ValueError for another."""
        given = {name: np.array(state[name]) for name in self.state()}
        for name, was in self.state().items():
            if given[name].dtype != was.dtype or given[name].shape[1:] != was.shape[1:]:
                raise ValueError(f"{name} is of another graph")
        self._peaks, self._sums, self._calls, self._counts = given.values()


def joined(first: Range, second: Range) -> Range:
    """The range of a weight that both activations are multiplied with."""
    return Range(
        np.maximum(first.peaks, second.peaks),
        np.maximum(first.means, second.means),
        first.counts + second.counts,
    )
