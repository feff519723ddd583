"""Budgets as they are written, and every way to write one wrongly."""

from __future__ import annotations

import math

import pytest

from toolchain.errors import UsageError
from toolchain.tune.budget import LPIPS, parse_budgets, summarise


def test_budgets_are_read() -> None:
    budget = parse_budgets(["psnr_db>=28", "median_psnr_db >= 36.5", "ssim>=0.9", "cosine>=1"])
    assert budget.limits == {"psnr_db": 28.0, "median_psnr_db": 36.5, "ssim": 0.9, "cosine": 1.0}
    assert str(budget) == "psnr_db >= 28, median_psnr_db >= 36.5, ssim >= 0.9, cosine >= 1"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("35", "is not of the form METRIC>=LIMIT"),
        ("", "is not of the form METRIC>=LIMIT"),
        ("psnr_db>=", "is not of the form METRIC>=LIMIT"),
        ("psnr>=35", "psnr is no metric"),
        ("psnr_db<=35", "psnr_db has a lower limit: psnr_db>=35"),
        ("psnr_db>35", "psnr_db has a lower limit: psnr_db>=35"),
        ("psnr_db>=much", "much is no number"),
        ("psnr_db>=nan", "the limit must be above 0 and at most 200"),
        ("psnr_db>=0", "the limit must be above 0 and at most 200"),
        ("psnr_db>=-3", "the limit must be above 0 and at most 200"),
        ("ssim>=1.5", "the limit must be above 0 and at most 1"),
        ("lpips<=0.1", LPIPS),
    ],
)
def test_a_bad_budget_is_refused(text: str, said: str) -> None:
    with pytest.raises(UsageError) as error:
        parse_budgets([text])
    assert f"{text!r}: {said}" in str(error.value)


def test_all_problems_are_told_at_once() -> None:
    with pytest.raises(UsageError) as error:
        parse_budgets(["psnr_db>=30", "psnr_db>=31", "x>=1"])
    assert "'psnr_db>=31': psnr_db is given twice" in str(error.value)
    assert "'x>=1': x is no metric" in str(error.value)
    assert parse_budgets([]).limits == {}


def test_what_is_missed_is_told() -> None:
    budget = parse_budgets(["psnr_db>=28", "ssim>=0.9"])
    assert budget.missed({"psnr_db": 28.0, "ssim": 0.95}) == []
    assert budget.missed({"psnr_db": 27.25, "ssim": math.nan}) == [
        "psnr_db 27.25, at least 28",
        "ssim nan, at least 0.9",
    ]
    # Just below 1 every digit counts; what was not measured is not missed.
    near = parse_budgets(["cosine>=0.9999999", "psnr_db>=30"])
    assert near.missed({"cosine": 0.9999995}) == ["cosine 0.9999995, at least 0.9999999"]
    assert str(near) == "cosine >= 0.9999999, psnr_db >= 30"


def test_pictures_are_summed_up() -> None:
    assert summarise([30.0, 40.0, math.inf], [0.9, 1.0, 1.0], None) == {
        "psnr_db": 30.0,
        "median_psnr_db": 40.0,
        "ssim": 0.9,
    }
    assert summarise([30.0], [1.0], 0.5)["cosine"] == 0.5
