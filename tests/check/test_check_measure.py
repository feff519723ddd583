"""Polygraphy's numbers against plain numpy, and the rules for integers and pictures."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import pytest
import torch

from toolchain.check.measure import Feed, compare_engine, measure
from toolchain.check.pictures import CompiledPicture, is_blank, judge
from toolchain.engines.buffers import HostMemory
from toolchain.recipe import Tolerance
from toolchain.signature import GraphSpec, TensorSpec

TOLERANCE = Tolerance(cosine=0.999, snr_db=40.0, max_error=0.01)
LIMITS_8BIT = {"psnr_db": 40.0, "ssim": 0.98}


def arrays(noise: float, shape: tuple[int, ...] = (4, 2, 4, 8, 8)) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    reference = (10 * random.standard_normal(shape)).astype(np.float32)
    return reference, (reference + noise * random.standard_normal(shape)).astype(np.float32)


@pytest.mark.parametrize("noise", [1e-6, 1e-3, 0.05, 1.0, 30.0])
def test_values_are_those_of_numpy(noise: float) -> None:
    reference, engine = arrays(noise)
    metrics, limits, failed = measure(reference, engine, TOLERANCE)
    x, y = reference.astype(np.float64).ravel(), engine.astype(np.float64).ravel()
    assert metrics.cosine == pytest.approx(x @ y / (np.linalg.norm(x) * np.linalg.norm(y)), rel=1e-12)
    assert metrics.snr_db == pytest.approx(10 * np.log10((x**2).mean() / ((x - y) ** 2).mean()), rel=1e-9)
    assert metrics.max_error == pytest.approx(np.abs(x - y).max() / np.abs(x).max(), rel=1e-9)
    assert (limits.cosine, limits.snr_db, limits.max_error) == (0.999, 40.0, 0.01)
    missed = {"cosine": metrics.cosine < 0.999, "snr_db": metrics.snr_db < 40, "max_error": metrics.max_error > 0.01}
    assert failed == tuple(name for name, bad in missed.items() if bad)


class FakeEngine:
    """Doubles its input, but for an error."""

    spec = GraphSpec((TensorSpec("x", "float32", (2,)),), (TensorSpec("y", "float32", (2,)),))

    def bind(self, buffers: dict[str, np.ndarray]) -> Callable[[], None]:
        def launch() -> None:
            buffers["y"][...] = 2 * buffers["x"] + 0.25

        return launch

    def close(self) -> None:
        pass


def test_the_reference_runs_only_on_inputs_that_it_has_not_seen() -> None:
    seen: list[np.ndarray] = []

    def module(x: torch.Tensor) -> torch.Tensor:
        seen.append(x.numpy())
        return 2 * x

    x = np.array([1, -2], np.float32)
    known, new = Feed("known", {"x": x}, 3, {"y": 2 * x}), Feed("new", {"x": 3 * x})
    entries, references = compare_engine(
        "c",
        "any",
        FakeEngine.spec,
        cast(Any, module),
        HostMemory,
        cast(Any, lambda memory: FakeEngine()),
        [known, new],
        TOLERANCE,
    )
    assert [array.tolist() for array in seen] == [[3, -6]]
    assert [r["y"].tolist() for r in references] == [[2, -4], [6, -12]]
    assert [(e.input, e.evaluation, e.metrics.max_error) for e in entries] == [
        ("known", 3, 0.25 / 4),
        ("new", None, 0.25 / 12),
    ]


def test_the_reference_is_the_signal() -> None:
    reference = np.ones((2, 8), np.float32)
    metrics, _, _ = measure(reference, 3 * reference, TOLERANCE)
    assert metrics.snr_db == pytest.approx(-20 * math.log10(2))
    assert metrics.max_error == 2.0


def test_equal_arrays_pass_even_the_strictest_limits() -> None:
    reference, _ = arrays(0.0)
    metrics, _, failed = measure(reference, reference.copy(), Tolerance(cosine=0.9999999, snr_db=200, max_error=1e-9))
    assert (metrics.snr_db, metrics.max_error, failed) == (math.inf, 0.0, ())
    assert metrics.cosine == pytest.approx(1.0, abs=1e-15)


def test_a_reference_of_zeros_is_compared_absolutely() -> None:
    zeros = np.zeros((3, 3), np.float32)
    assert measure(zeros, zeros, TOLERANCE)[2] == ()
    metrics, _, failed = measure(zeros, zeros + np.float32(0.5), TOLERANCE)
    assert (metrics.max_error, metrics.snr_db) == (0.5, -math.inf)
    assert failed == ("cosine", "snr_db", "max_error")


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_one_value_that_is_not_finite_fails(value: float) -> None:
    reference, engine = arrays(0.0)
    engine[0, 0, 0, 0, 0] = value
    assert "finite" in measure(reference, engine, TOLERANCE)[2]
    reference[0, 0, 0, 0, 0] = value  # the same in both is no better: nothing is compared then
    assert "finite" in measure(reference, engine, TOLERANCE)[2]


def test_arrays_in_another_order_of_memory_are_compared() -> None:
    reference, engine = arrays(1e-3, (2, 3, 8, 8))
    straight = measure(reference.transpose(0, 2, 3, 1).copy(), engine.transpose(0, 2, 3, 1).copy(), TOLERANCE)
    assert measure(reference.transpose(0, 2, 3, 1), engine.transpose(0, 2, 3, 1), TOLERANCE) == straight


def test_counters_must_be_equal() -> None:
    one = np.array([1], np.int64)
    assert measure(one, one, TOLERANCE)[2] == ()
    metrics, limits, failed = measure(one, one + 1, TOLERANCE)
    assert (metrics.difference, limits.difference, failed) == (1.0, 0.0, ("difference",))


@pytest.mark.parametrize(("max_error", "levels"), [(1e-3, 1), (1 / 255, 1), (0.01, 3), (0.03, 8)])
def test_pixels_may_differ_by_what_rounding_makes_of_the_tolerance(max_error: float, levels: int) -> None:
    pixels = np.full((1, 8, 8, 3), 100, np.uint8)
    tolerance = Tolerance(max_error=max_error)
    assert measure(pixels, pixels + np.uint8(levels), tolerance)[2] == ()
    metrics, limits, failed = measure(pixels, pixels - np.uint8(levels + 1), tolerance)
    assert (metrics.difference, limits.difference, failed) == (levels + 1.0, float(levels), ("difference",))


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)


def test_an_identical_picture_has_infinite_psnr_and_passes() -> None:
    result = judge(CompiledPicture("p", 5, picture(), True), picture(), LIMITS_8BIT)
    assert (result.psnr_db, result.ssim, result.failed) == (math.inf, 1.0, ())
    assert (result.size, result.seed) == ("64x96", 5)


def test_psnr_is_that_of_eight_bits() -> None:
    reference = np.full((64, 64, 3), 100, np.uint8)
    reference[::2] = 200
    result = judge(CompiledPicture("p", 0, reference + np.uint8(2), True), reference, LIMITS_8BIT)
    assert result.psnr_db == pytest.approx(20 * math.log10(255 / 2))


def test_another_picture_fails_psnr_and_ssim() -> None:
    assert judge(CompiledPicture("p", 0, picture(1), True), picture(0), LIMITS_8BIT).failed == ("psnr_db", "ssim")


def test_latents_that_are_not_finite_fail_whatever_the_picture() -> None:
    assert judge(CompiledPicture("p", 0, picture(), False), picture(), LIMITS_8BIT).failed == ("finite",)


@pytest.mark.parametrize("colour", [(0, 0, 0), (255, 128, 0)])
def test_a_blank_picture_fails_unless_the_reference_is_blank(colour: tuple[int, int, int]) -> None:
    blank = np.broadcast_to(np.array(colour, np.uint8), (64, 96, 3)).copy()
    assert is_blank(blank)
    assert not is_blank(picture())
    assert "not blank" in judge(CompiledPicture("p", 0, blank, True), picture(), LIMITS_8BIT).failed
    assert judge(CompiledPicture("p", 0, blank, True), blank, LIMITS_8BIT).failed == ()
