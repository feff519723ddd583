"""Reports without a comparison: JSON, order, lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.check.page_samples import bundle
from toolchain.check.page import render
from toolchain.check.report import CheckReport, Entry, Metrics, Picture

LIMITS = Metrics(cosine=0.999, snr_db=40.0, max_error=0.01)


def entry(
    output: str = "image", failed: tuple[str, ...] = (), *, snr_db: float = 60.0, max_error: float = 1e-4
) -> Entry:
    return Entry("vae_decoder", "1x64x64", "prompt 1", output, Metrics(0.99999, snr_db, max_error), LIMITS, failed)


def report(entries: list[Entry], pictures: list[Picture]) -> CheckReport:
    return CheckReport(
        bundle="b",
        recipe="r",
        model="m",
        revision=None,
        backend="onnxruntime",
        device={"kind": "cpu"},
        versions={"torch": "2"},
        warnings=("a warning",),
        entries=tuple(entries),
        pictures=tuple(pictures),
        limits={"psnr_db": 40.0, "ssim": 0.98},
    )


def test_json_has_no_nan_or_infinity(tmp_path: Path) -> None:
    nan = Entry(
        "denoiser", "any", "prompt 1", "next_state", Metrics(math.nan, -math.inf, math.nan), LIMITS, ("finite",)
    )
    result = report([nan, entry(snr_db=math.inf)], [Picture("p", 0, "64x64", math.inf, 1.0, ())])
    result.save(tmp_path / "report.json")

    def refuse(token: str) -> float:
        raise AssertionError(token)

    data = json.loads((tmp_path / "report.json").read_text(), parse_constant=refuse)
    assert data["schema"] == 1
    assert data["passed"] is False
    assert data["entries"][0]["metrics"] == {"cosine": "nan", "snr_db": "-inf", "max_error": "nan"}
    assert data["entries"][1]["metrics"]["snr_db"] == "inf"
    assert data["worst"]["failed"] == ["finite"]
    assert data["pictures"][0]["psnr_db"] == "inf"
    assert data["summary"] == {
        "psnr_db": {"min": "inf", "median": "inf"},
        "ssim": {"min": 1.0, "median": 1.0},
        "flip": None,
        "clip": None,
    }


def test_an_entry_or_a_picture_alone_fails_the_report() -> None:
    good, bad = Picture("p", 0, "64x64", 50.0, 0.99, ()), Picture("p", 0, "64x64", 10.0, 0.99, ("psnr_db",))
    assert report([entry()], [good]).passed
    assert not report([entry()], [good, bad]).passed
    assert not report([entry(failed=("snr_db",), snr_db=1.0)], [good]).passed


def test_worst_first_puts_failures_before_near_misses() -> None:
    near, far = entry("near", snr_db=40.1), entry("far", snr_db=90.0)
    failed = entry("failed", ("max_error",), max_error=0.02)
    broken = Entry("denoiser", "any", "p", "broken", Metrics(math.nan, math.nan, math.nan), LIMITS, ("finite",))
    order = [e.output for e in report([far, near, failed, broken], []).worst_first()]
    assert order == ["broken", "failed", "near", "far"]


@pytest.mark.parametrize(
    ("metrics", "limits", "margin"),
    [
        (Metrics(snr_db=46.0), Metrics(snr_db=40.0), 6.0),
        (Metrics(max_error=0.001), Metrics(max_error=0.01), 20.0),
        (Metrics(max_error=0.1), Metrics(max_error=0.01), -20.0),
        (Metrics(cosine=0.9999), Metrics(cosine=0.999), 10.0),
        (Metrics(cosine=1.0), Metrics(cosine=1.0), math.inf),
        (Metrics(cosine=0.9), Metrics(cosine=1.0), -math.inf),
        (Metrics(difference=1.0), Metrics(difference=1.0), math.inf),
        (Metrics(difference=1.0), Metrics(difference=0.0), -math.inf),
        (Metrics(max_error=math.inf), Metrics(max_error=0.01), -math.inf),
        (Metrics(max_error=1e300), Metrics(max_error=0.01), -6040.0),
        (Metrics(snr_db=-math.inf), Metrics(snr_db=40.0), -math.inf),
    ],
)
def test_margins_are_ratios_of_error_powers(metrics: Metrics, limits: Metrics, margin: float) -> None:
    assert Entry("c", "any", "i", "o", metrics, limits, ()).margin_db == pytest.approx(margin, abs=1e-6)


def test_lines_name_what_failed_and_what_was_needed() -> None:
    pictures = [Picture("a red circle", 3, "64x96", 12.0, 0.5, ("psnr_db", "ssim", "not blank"))]
    text = "\n".join(report([entry(failed=("snr_db",), snr_db=12.0), entry("pixels")], pictures).lines())
    assert "warning: a warning" in text
    assert "failed: vae_decoder 1x64x64, prompt 1, image: cosine 0.99999, snr_db 12 (at least 40)" in text
    assert "failed: picture 64x96, seed 3, 'a red circle': psnr_db 12 (at least 40)" in text
    assert "not blank" in text
    assert "FAILED: 2 of 3 comparisons" in text


def test_lines_show_the_worst_of_each_metric_by_itself() -> None:
    lines = report([entry(snr_db=80.0, max_error=0.005), entry(snr_db=50.0, max_error=0.001)], []).lines()
    assert "vae_decoder  1x64x64  image   2       cosine 0.99999, snr_db 50, max_error 0.005  passed" in lines


def test_lines_count_the_failures_that_they_leave_out() -> None:
    lines = report([entry(str(i), ("snr_db",), snr_db=1.0) for i in range(20)], []).lines()
    assert sum(line.startswith("failed: vae") for line in lines) == 12
    assert "failed: 8 more, all in the JSON report" in lines


def test_latents_are_listed_by_evaluation_with_the_worst_of_all_trajectories() -> None:
    def at(evaluation: int, prompt: int, cosine: float, output: str = "next_state") -> Entry:
        label, metrics = f"prompt {prompt}, evaluation {evaluation} of 2", Metrics(cosine, 50.0, 1e-4)
        return Entry("denoiser", "1x64x64", label, output, metrics, LIMITS, (), evaluation)

    rounded = at(1, 1, 0.5, "next_state, every value in float16")
    compared = report([at(2, 1, 0.98), at(1, 1, 0.999), at(1, 2, 0.97), at(2, 2, math.nan), rounded, entry()], [])
    steps = compared.by_evaluation()["denoiser 1x64x64"]
    assert list(steps) == [1, 2]
    assert steps[1] == {"cosine": 0.97, "snr_db": 50.0, "max_error": 1e-4}
    assert compared.to_json()["steps"] == {
        "denoiser 1x64x64": [
            {"evaluation": 1, "cosine": 0.97, "snr_db": 50.0, "max_error": 1e-4},
            {"evaluation": 2, "cosine": "nan", "snr_db": 50.0, "max_error": 1e-4},
        ]
    }
    read = render(compared, bundle())
    assert "Latents by evaluation, the worst of all trajectories" in read
    assert "0.97" in read.partition("Latents by evaluation")[2].partition("</table>")[0]
    assert "Latents by evaluation" not in render(report([entry()], []), bundle())
