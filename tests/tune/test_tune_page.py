"""The page of a tuning, of made-up results: no complaint, no request, nothing wider than the screen."""

from __future__ import annotations

import re
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import pytest

from tests.check.page_samples import HOSTILE, RECIPE
from tests.check.test_check_page_browser import CHROMIUM, DESKTOP, PHONE, Browser
from tests.tiny import recipe_for
from toolchain.recipe import Quantize
from toolchain.tune.page import render
from toolchain.tune.pictures import DRAWN, Measured
from toolchain.tune.result import Overflow, Point, Trial, Tuned
from toolchain.tune.search import Unit


def sample(folder: Path) -> Tuned:
    """Hostile names, equal pictures, a long curve."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 64, 96, 3)).astype(np.uint8)
    np.savez_compressed(folder / DRAWN, pixels=pixels)

    def measured(psnr: float) -> Measured:
        return Measured((psnr, psnr + 8, float("inf")), (0.95, 0.97, 1.0), 0.9999, 12.5, folder / DRAWN)

    points = tuple(Point(n, 0.96 - 0.04 * n, measured(25 + 3 * n)) for n in range(12))
    return Tuned(
        recipe=replace(RECIPE, name=HOSTILE),
        model=HOSTILE,
        backend="onnxruntime",
        budget={"psnr_db": 31.0},
        prompts=3,
        seeds=(0,),
        trials=(Trial("denoiser", "ranges", "percentile=99.9", 1e-5),),
        units=tuple(Unit("denoiser", f"down_blocks.{i}.{HOSTILE}", 10**9, 10**6, 0.5 / (i + 1)) for i in range(90)),
        alone={"denoiser": measured(40.0)},
        points=points,
        chosen=points[2],
        naive=(Point(0, 0.96, measured(20.0)), Point(2, 0.88, measured(24.0))),
        held_out=measured(31.5),
        reference_step_ms=20.0,
        overflows=(Overflow("vae_decoder", "decoder.mid_block", 1.2e5, 'keep_float32 = ["decoder.mid_block"]'),),
        versions={"diffbuild": "0"},
        least_psnr_db=33.0,
        reference=pixels,
        text=f"# {HOSTILE}\n",
    )


def test_the_page_escapes_and_counts(tmp_path: Path) -> None:
    page = render(sample(tmp_path))
    assert "<script" not in page
    assert page.count("data:image/png") == 3 * 2
    assert page.count('class="bar') == 60
    assert "Shown are the first 60." in page
    assert "Shown are" not in render(replace(sample(tmp_path), units=sample(tmp_path).units[:60]))
    assert page.count('class="bar left"') == 2
    assert page.count("<circle") == 2 * (12 + 2)
    assert "values of up to 1.2e+05" in page
    assert "1.60 times as fast, one drawn after the other (the gate of a build times both in turn)" in page
    assert "99.000" not in page  # equal pictures are infinite in words, and drawn at the edge


def test_the_largest_ranges_may_be_what_was_chosen(tmp_path: Path) -> None:
    """Where they draw better pictures, the chosen candidate equals the naive one and is still told apart."""
    made = sample(tmp_path)
    assert made.chosen is not None
    made = replace(made, naive=(replace(made.points[0]), replace(made.chosen)))
    page = render(made)
    assert page.count('class="chosen"') == 2
    assert page.rindex('class="chosen"') > page.rindex('class="naive"')
    assert page.count('class="naive"') == 2 * 2
    marks = [line.split()[-1] for line in made.lines() if line.startswith(("0 ", "2 "))]
    assert marks == ["12.5", "scales", "chosen", "scales"]


def test_the_options_that_were_taken_are_marked(tmp_path: Path) -> None:
    recipe = recipe_for("denoiser", quantize=Quantize("int8", activations="int8"))
    trials = tuple(Trial("denoiser", "ranges", value, error) for value, error in (("max", 2e-5), ("mean", 1e-5)))
    page = render(replace(sample(tmp_path), recipe=recipe, trials=trials))
    marks = re.findall(r"<td>(max|mean)</td><td[^>]*>\S+?</td><td>(taken)?</td>", page)
    assert marks == [("max", "taken"), ("mean", "")]


def test_without_overflow_that_is_said(tmp_path: Path) -> None:
    plain = replace(sample(tmp_path), chosen=None, overflows=())
    assert list(plain.lines()) == ["every value stays in the range of its type: the recipe is as it was"]


@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on PATH")
@pytest.mark.parametrize("width", [PHONE[0], DESKTOP[0]])
def test_a_browser_shows_it_without_complaint(width: int, tmp_path: Path) -> None:
    browser = Browser(tmp_path)
    html = render(sample(tmp_path))
    assert browser.open(html)[1:] == ([], [])
    frame = f"""<!doctype html><iframe id="f" width="{width}" height="900" style="border: 0"
        srcdoc="{escape(html.replace("<details>", "<details open>"))}"></iframe><script>f.onload = () => {{
            const root = f.contentDocument.documentElement;
            document.title = ['widths', root.clientWidth, root.scrollWidth].join(' ');
        }}</script>"""
    match = re.search(r"<title>widths (\d+) (\d+)</title>", browser.open(frame)[0])
    assert match
    assert (int(match[1]), int(match[2])) == (width, width)
