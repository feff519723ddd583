"""Outputs of watched graphs, added up to ranges."""

from __future__ import annotations

import numpy as np
import pytest

from toolchain.precision.collect import Collector, Watched
from toolchain.precision.ranges import histogram

WATCHED = (Watched(("q", "k"), 3, 12), Watched(("out",), 2, 8))


def launch(seed: int) -> np.ndarray:
    """The output for two activations of 4 rows with 3 and 2 channels."""
    generator = np.random.default_rng(seed)
    first, second = (generator.standard_normal((4, n)).astype(np.float32) for n in (3, 2))
    return np.concatenate([np.abs(first).max(axis=0), first.ravel(), np.abs(second).max(axis=0), second.ravel()])


def collected(calls: list[tuple[int, int]]) -> Collector:
    """From (step, seed)."""
    collector = Collector(WATCHED)
    for step, seed in calls:
        collector.add(step, launch(seed))
    return collector


CALLS = [(step, 10 * picture + step) for picture in range(3) for step in range(2)]


def test_ranges_are_those_of_all_launches() -> None:
    ranges = collected(CALLS).ranges()
    assert sorted(ranges) == ["k", "out", "q"]
    assert ranges["q"] is ranges["k"]
    peaks = np.array([[launch(10 * picture + step) for picture in range(3)] for step in range(2)])
    np.testing.assert_array_equal(ranges["q"].peaks, peaks[:, :, :3].max(axis=1))
    np.testing.assert_array_equal(ranges["out"].peaks, peaks[:, :, 15:17].max(axis=1))
    np.testing.assert_allclose(ranges["q"].means, peaks[:, :, :3].max(axis=2).mean(axis=1), rtol=1e-6)
    samples = np.concatenate([launch(seed)[17:] for _, seed in CALLS])
    np.testing.assert_array_equal(ranges["out"].counts, histogram(samples))


def test_a_weight_of_two_activations_has_the_range_of_both() -> None:
    collector = Collector((Watched(("tied",), 2, 2), Watched(("tied",), 2, 2)))
    collector.add(0, np.float32([1, 5, 1, -5, 3, 2, 3, 2]))
    (seen,) = collector.ranges().values()
    assert seen.peaks.tolist() == [[3, 5]]
    assert seen.means.tolist() == [5]
    assert seen.counts.sum() == 4


@pytest.mark.parametrize("at", range(len(CALLS)))
def test_a_restored_collector_ends_as_if_it_had_never_stopped(at: int) -> None:
    whole, again = collected(CALLS), Collector(WATCHED)
    again.restore(collected(CALLS[:at]).state())
    for step, seed in CALLS[at:]:
        again.add(step, launch(seed))
    for name, array in whole.state().items():
        np.testing.assert_array_equal(again.state()[name], array)


def test_the_state_of_another_graph_is_refused() -> None:
    with pytest.raises(ValueError, match="another graph"):
        Collector(WATCHED[:1]).restore(collected(CALLS).state())
    with pytest.raises(KeyError):
        Collector(WATCHED).restore({})


@pytest.mark.parametrize("wrong", [np.inf, np.nan])
@pytest.mark.parametrize("where", [16, -1])
def test_what_overflows_is_named(where: int, wrong: float) -> None:
    """By a peak or by a sample: a maximum of NaN and numbers is the largest number."""
    collector = collected(CALLS)
    assert collector.overflowing() == []
    values = launch(0)
    values[where] = wrong
    collector.add(1, values)
    collector.add(1, launch(1))
    assert collector.overflowing() == ["out"]
