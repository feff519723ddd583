"""Ranges of activations: what calibration keeps, and the scales that are made of it."""

from __future__ import annotations

import numpy as np
import pytest

from toolchain.precision.ranges import BINS, OCTAVE, Range, bin_edge, histogram, parse_method


def seen(values: np.ndarray, *, steps: int = 4) -> Range:
    """Of `values` [steps * calls, channels]."""
    calls = np.abs(values.reshape(steps, -1, values.shape[-1]))
    peaks = calls.max(axis=1).astype(np.float32)
    return Range(peaks, calls.max(axis=2).mean(axis=1).astype(np.float32), histogram(values))


@pytest.fixture
def normal() -> np.ndarray:
    return np.random.default_rng(0).standard_normal((40_000, 8)).astype(np.float32)


def test_max_is_the_largest_magnitude(normal: np.ndarray) -> None:
    assert seen(normal).largest("max") == np.abs(normal).max()


def test_channels_keep_their_own_maximum(normal: np.ndarray) -> None:
    np.testing.assert_array_equal(seen(normal).channels, np.abs(normal).max(axis=0))


def test_first_steps_do_not_see_the_later_ones(normal: np.ndarray) -> None:
    normal[20_000:] *= 100
    assert seen(normal).largest("first_steps=0.5") == np.abs(normal[:20_000]).max()
    assert seen(normal).largest("first_steps=0.51") == np.abs(normal[:30_000]).max()  # part of a step is a step


def test_mean_averages_over_calls_and_steps() -> None:
    values = np.array([[1.0, -2], [3, 0], [0, -5], [1, 6]], np.float32)
    assert seen(values, steps=2).largest("mean") == np.mean([2, 3, 5, 6])


@pytest.mark.parametrize("percent", [90, 99, 99.9, 99.99])
def test_percentiles_are_numpys(normal: np.ndarray, percent: float) -> None:
    expected = np.percentile(np.abs(normal), percent)
    found = seen(normal).largest(f"percentile={percent}")
    assert expected * (1 - 1e-3) <= found <= expected * 2 ** (1 / OCTAVE) * (1 + 1e-2)


def test_the_hundredth_percentile_is_the_maximum(normal: np.ndarray) -> None:
    assert seen(normal).largest("percentile=100") == np.abs(normal).max()


def test_bins_hold_what_lies_between_their_edges() -> None:
    values = np.array([1e-30, 0.3, 1.0, 1.02, 6e4, 3e38, -0.3], np.float32)
    for value in values:
        (index,) = np.nonzero(histogram(value[None]))[0]
        assert bin_edge(index) <= abs(value) < bin_edge(index + 1)
    assert histogram(values).sum() == len(values)
    assert bin_edge(BINS) == np.inf


def test_zeros_are_counted() -> None:
    assert histogram(np.zeros(5, np.float32))[0] == 5


def test_what_is_not_finite_is_left_out() -> None:
    assert histogram(np.array([np.inf, -np.inf, np.nan, 1], np.float32)).sum() == 1


@pytest.mark.parametrize(
    "text", ["", "min", "percentile", "percentile=50", "percentile=101", "first_steps=0", "first_steps=1.1", "max=1"]
)
def test_other_methods_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected"):
        parse_method(text)
