"""The search on tables of errors made by hand."""

from __future__ import annotations

import pytest

from toolchain.tune.search import Order, Unit, largest_passing, ordered


def unit(name: str, macs: int, error: float) -> Unit:
    return Unit("denoiser", name, macs, 1, error)


UNITS = ordered([unit("cheap", 100, 1.0), unit("bad", 100, 50.0), unit("small", 10, 6.0), unit("equal", 100, 1.0)])


def test_the_dearest_multiply_accumulate_is_excluded_first() -> None:
    assert [u.pattern for u in UNITS] == ["small", "bad", "cheap", "equal"]


def test_shares_and_errors_of_candidates() -> None:
    order = Order(UNITS, fixed=90)
    assert [round(order.share(n), 3) for n in range(5)] == [0.775, 0.75, 0.5, 0.25, 0.0]
    assert [order.error(n) for n in range(5)] == [58.0, 52.0, 2.0, 1.0, 0.0]


def test_the_curve_goes_from_all_to_half() -> None:
    order = Order(UNITS, fixed=90)
    assert order.most_excluded == 2
    assert order.points() == [0, 1, 2]


@pytest.mark.parametrize("least", range(13))
def test_bisection_finds_the_least_that_has_to_be_excluded(least: int) -> None:
    asked: list[int] = []

    def passes(excluded: int) -> bool:
        asked.append(excluded)
        return excluded >= least

    assert largest_passing([0, 3, 5, 12], passes) == least
    assert len(asked) <= 4 + 3
    assert len(asked) == len(set(asked))


def test_no_point_passes() -> None:
    assert largest_passing([0, 3, 5], lambda excluded: excluded > 5) is None


def test_one_unit_is_one_candidate() -> None:
    order = Order([unit("only", 100, 1.0)], fixed=0)
    assert order.points() == [0]
    assert largest_passing(order.points(), lambda excluded: True) == 0
