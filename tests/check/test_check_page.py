"""The page of a check: what it says, in which order, and that nothing in it is taken for markup or loaded."""

from __future__ import annotations

import base64
import dataclasses
import io
import math
import re
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from tests.check.page_samples import DIGEST, HOSTILE, RECIPE, bundle, entry, failing, passing, picture, report
from toolchain.check import page
from toolchain.check.charts import Scale, curve_chart
from toolchain.check.markup import Html, element, join
from toolchain.check.page import render, save_page
from toolchain.check.report import CheckReport
from toolchain.cli.main import cli
from toolchain.recipe import Recipe
from toolchain.recipe.toml import toml


class Reader(HTMLParser):
    """The text of a page, its elements, and whether every element that was opened was closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "input", "link", "meta"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.texts))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def good() -> Reader:
    return Reader(render(passing(), bundle()))


@pytest.fixture(scope="module")
def bad() -> Reader:
    return Reader(render(failing(), bundle()))


def test_the_verdict_comes_first_with_the_number_of_gates(good: Reader, bad: Reader) -> None:
    assert "Passed all 9 gates kept" in good.text
    assert "Failed 6 of 10 gates missed" in bad.text
    assert "Failed" not in good.text
    assert "FAILED" not in good.text
    assert good.text.index("Passed") < good.text.index("Pictures")
    assert "passed: diffbuild check: sample" in good.text
    assert "FAILED: diffbuild check: sample" in bad.text


def test_what_missed_is_named_with_measure_and_limit(bad: Reader) -> None:
    verdict = bad.text.partition("Error by component")[0]
    assert "text_encoder any, output: 1 of 2 missed; prompt 2: cosine nan (at least 0.999)" in verdict
    assert "denoiser 1x64x64, output: 2 of 4 missed; prompt 1, evaluation 20 of 20" in verdict
    assert "snr_db 35 (at least 60)" in verdict
    assert "pictures: 3 of 4 missed" in verdict
    assert "Warning: the denoiser's weights are not those" in verdict


def test_pictures_come_worst_first_with_their_limits(bad: Reader) -> None:
    prompts = ["a blank one", HOSTILE, "a middling one", "a good one"]
    places = [bad.text.index(f"{prompt} 64x96, seed 7:") for prompt in prompts]
    assert places == sorted(places)
    assert re.search(r"a middling one 64x96, seed 7: PSNR 2\d\.\d dB \(at least 40 dB\) , SSIM 0\.\d+ \(at", bad.text)
    assert "SSIM NaN (at least 0.98) , latents are not finite , blank , FAILED" in bad.text


def test_comparisons_come_worst_first(bad: Reader) -> None:
    rows = bad.text.partition("All 6 comparisons of components, the worst first")[2]
    places = [
        rows.index(text)
        for text in ("prompt 2", "evaluation 20 of", "evaluation 10 of", "evaluation 4 of", "evaluation 1 of")
    ]
    assert places == sorted(places)
    assert "35 (≥ 60)" in rows
    assert "NaN (≤ 0.01)" in rows


def test_a_prompt_with_markup_comes_out_as_text(bad: Reader) -> None:
    assert bad.all("script") == []
    assert bad.text.count("<script>alert(1)</script>") == 2  # the picture and the recipe
    assert HOSTILE in bad.text
    assert "engines/denoiser/<b>.onnx" in bad.text
    assert "<script" not in render(failing(), bundle())


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(bad: Reader) -> None:
    html = re.sub("base64,[A-Za-z0-9+/=]+", "", render(failing(), bundle()))
    assert not re.search(r"https?:|//|@import|url\(|javascript:", html, re.IGNORECASE)
    for _, attributes in bad.tags:
        for name, value in attributes.items():
            assert name not in ("srcset", "style", "action")
            assert not name.startswith("on")
            if name in ("src", "href"):
                assert value is not None
                assert value.startswith("data:")
    (policy,) = [m["content"] for m in bad.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy is not None
    assert "default-src 'none'" in policy


def test_pixels_are_those_of_the_pictures_and_their_difference() -> None:
    shown = picture("p", 3, (8, 16))
    images = Reader(render(report([], [shown]), bundle())).all("img")
    arrays = [np.asarray(Image.open(io.BytesIO(base64.b64decode(str(i["src"]).partition(",")[2])))) for i in images]
    assert shown.pixels is not None
    assert np.array_equal(arrays[0], shown.pixels.reference)
    assert np.array_equal(arrays[1], shown.pixels.compiled)
    assert (arrays[2] == 3 * page.AMPLIFIED).all()
    assert [i["class"] for i in images] == ["small"] * 3
    assert (images[0]["width"], images[0]["height"]) == ("16", "8")


def test_the_difference_is_told_in_words(good: Reader) -> None:
    assert "Every pixel is the same." in good.text
    assert "100.0% of the pixels differ, by 1 of 255 levels at most." in good.text
    assert f"difference x{page.AMPLIFIED}" in good.text


def test_pictures_beyond_the_budget_are_listed_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "SHOWN_PIXELS", 2 * 64 * 96)
    read = Reader(render(failing(), bundle()))
    assert len(read.all("img")) == 2 * 3
    assert "Not shown, to keep this page small, are 2 that are better than these:" in read.text
    assert read.text.index("a middling one") > read.text.index("Not shown")
    monkeypatch.setattr(page, "SHOWN_PIXELS", 1)
    assert len(Reader(render(failing(), bundle())).all("img")) == 3


def test_every_component_and_bucket_has_a_row_with_its_limit(good: Reader, bad: Reader) -> None:
    labels = [svg.get("aria-label") for svg in good.all("svg") if svg.get("role") == "img"]
    assert labels == [
        "text_encoder: 130.0 dB (at least 60 dB)",
        "vae_encoder 1x64x64: ∞ dB (at least 60 dB)",
        "denoiser 1x64x64: 80.0 dB (at least 60 dB)",
        "lowest 80.0 dB, prompt 1, evaluation 20 of 20; at least 60 dB",
    ]
    assert "NaN (at least 60 dB), FAILED" in bad.text
    assert "sampler any trajectory 1" in good.text  # has no ratio, so stands in the table alone


def test_a_curve_has_a_point_for_each_evaluation_at_its_place() -> None:
    entries = [entry("denoiser", "any", f"prompt 1, evaluation {i} of 5", snr, i) for i, snr in ((5, 0), (1, 80))]
    read = Reader(curve_chart({"prompt 1": entries}))
    assert [(c["cx"], c["cy"], c.get("class")) for c in read.all("circle")] == [
        ("0.00%", "20.00%", None),
        ("100.00%", "100.00%", "bad"),
    ]
    (line,) = [a for a in read.all("line") if a["class"] == "curve"]
    assert (line["x1"], line["y1"], line["x2"], line["y2"]) == ("0.00%", "20.00%", "100.00%", "100.00%")
    (limit,) = [a for a in read.all("line") if a["class"] == "limit"]
    assert limit["y1"] == limit["y2"] == "40.00%"


@pytest.mark.parametrize(
    ("values", "low", "high"),
    [([], 0, 20), ([59.0], 0, 80), ([80.0], 0, 100), ([-6.0], -20, 80), ([math.inf, math.nan, -math.inf], 0, 80)],
)
def test_a_scale_holds_every_finite_value_and_the_limits(values: list[float], low: float, high: float) -> None:
    scale = Scale.of([entry("c", "any", "i", value) for value in values])
    assert (scale.low, scale.high) == (low, high)
    assert (scale.percent(math.inf), scale.percent(-math.inf), scale.percent(math.nan)) == (100, 0, 0)


def test_model_device_versions_and_files_are_there(good: Reader) -> None:
    for text in ("owner/name at c0ffee", "kind cpu, cpu x86_64-avx512", "torch 2.13.0", "onnx 1.23"):
        assert text in good.text
    assert "StableDiffusionPipeline, family sd" in good.text
    assert DIGEST in good.text
    assert "f" * 64 in good.text
    assert "2 files with their sha256, 1,234,576 bytes" in good.text


def test_the_recipe_is_toml_that_reads_back() -> None:
    text = toml(RECIPE.to_json())
    assert Recipe.from_json(tomllib.loads(text)) == RECIPE
    assert "[check.components.denoiser]" in text
    assert toml({"a": None, "b": 1}) == "b = 1", "TOML has no null"
    assert toml({"a b": {"c": True, "d": {"é": 1.5}}}) == '["a b"]\nc = true\n\n["a b".d]\n"é" = 1.5'


def test_a_report_with_nothing_in_it_still_makes_a_page() -> None:
    read = Reader(render(report([], []), bundle()))
    assert "Passed all 0 gates kept" in read.text
    assert read.all("svg") == []


def test_pictures_without_pixels_show_their_numbers() -> None:
    numbers = CheckReport(**{**vars(passing()), "pictures": tuple(map(without_pixels, passing().pictures))})
    read = Reader(render(numbers, bundle()))
    assert read.all("img") == []
    assert "a red circle 64x96, seed 7: PSNR ∞ dB" in read.text


def without_pixels(shown: page.Picture) -> page.Picture:
    return dataclasses.replace(shown, pixels=None)


def test_pixels_are_neither_in_the_json_nor_in_equality() -> None:
    shown = picture("p", 3)
    assert set(shown.to_json()) == {"prompt", "seed", "size", "psnr_db", "ssim", "flip", "clip", "failed", "passed"}
    assert shown == without_pixels(shown)
    assert "array" not in repr(shown)


def test_only_markup_by_type_is_markup() -> None:
    assert join("a<b", Html("<i></i>"), "&") == "a&lt;b<i></i>&amp;"
    assert element("a", '"', class_='"><x', data_b=None, x_y=1) == '<a class="&quot;&gt;&lt;x" x-y="1">&quot;</a>'
    assert element("img", src="data:,") == '<img src="data:,">'


# --- the option -------------------------------------------------------------------------------------------------------


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> list[CheckReport]:
    """What `check` finds; the test may put another report there. Empty when nothing may be compared."""
    found: list[CheckReport] = []
    monkeypatch.setattr("toolchain.check.compare.compare", lambda *_, **__: found[0])
    monkeypatch.setattr("toolchain.builder.open_model.open_model", lambda *_, **__: None)
    monkeypatch.setattr("toolchain.bundle.bundle.read_bundle", lambda path: bundle())
    return found


@pytest.mark.parametrize(("made", "code"), [(passing, 0), (failing, 3)])
def test_check_writes_the_page_beside_the_report(
    checked: list[CheckReport], made: type[CheckReport], code: int, tmp_path: Path
) -> None:
    checked.append(made())
    outputs = ["--report", str(tmp_path / "a.json"), "--html", str(tmp_path / "a.html")]
    result = CliRunner().invoke(cli, ["check", "b", "--model", "m", *outputs])
    assert result.exit_code == code, result.output
    assert (tmp_path / "a.html").read_text(encoding="utf-8") == render(checked[0], bundle())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "a.json"]
    save_page(tmp_path / "a.html", passing(), bundle())
    assert "all 9 gates kept" in (tmp_path / "a.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--html", "folder"], "'--html': File 'folder' is a directory"),
        (["--report", "folder"], "'--report': File 'folder' is a directory"),
        (["--html", "none/a.html"], "the folder of the output is missing"),
        (["--html", "file/a.html"], "the folder of the output is missing"),
        (["--html", "a.html", "--report", "folder/../a.html"], "--report and --html name the same file"),
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_work_starts(
    checked: list[CheckReport], given: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("folder").mkdir()
    Path("file").touch()
    result = CliRunner().invoke(cli, ["check", "b", "--model", "m", *given])
    assert result.exit_code == 2, result.output
    assert said in result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "folder"]
