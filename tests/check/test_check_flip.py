"""FLIP of two pictures, and reports with and without the package that measures it."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from tests.check.page_samples import RECIPE, bundle, picture, report
from toolchain.check.flip import INSTALL, mean_flip
from toolchain.check.page import render
from toolchain.check.pictures import CompiledPicture, judge
from toolchain.check.report import show


def flat(level: int) -> np.ndarray:
    return np.full((64, 96, 3), level, np.uint8)


def test_it_is_nothing_for_equal_pictures_and_one_for_black_and_white() -> None:
    pytest.importorskip("flip_evaluator")
    assert mean_flip(flat(90), flat(90)) == 0
    assert mean_flip(flat(0), flat(255)) == pytest.approx(1, abs=0.05)
    little, much = (mean_flip(flat(90), flat(level)) for level in (92, 120))
    assert little is not None
    assert much is not None
    assert 0 < little < much < 1


def test_a_report_has_its_median_and_largest() -> None:
    pytest.importorskip("flip_evaluator")
    compared = report([], [picture("a", 1), picture("b", 8), picture("c", 0)])
    by_prompt = {p.prompt: p.flip for p in compared.pictures}
    assert by_prompt["c"] == 0
    data = compared.to_json()
    assert data["summary"]["flip"] == {"max": by_prompt["b"], "median": by_prompt["a"]}
    assert [p["flip"] for p in data["pictures"]] == [by_prompt[name] for name in "abc"]
    assert f"FLIP {show(by_prompt['b'])}." in render(compared, bundle())
    assert any(line.startswith("3 pictures, FLIP: max 0.") for line in compared.lines())


def test_without_the_package_a_report_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flip_evaluator", None)
    judged = judge(CompiledPicture("a", 0, flat(90), True), flat(90), RECIPE.picture_limits)
    assert judged.flip is None
    assert judged.passed
    compared = report([], [judged])
    assert compared.to_json()["summary"]["flip"] is None
    assert f"FLIP was not measured ({INSTALL})" in compared.lines()
