"""Reports that no model was run for: what a page of a check has to cope with."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np

from toolchain.bundle.bundle import Bundle, FileEntry
from toolchain.check.pictures import CompiledPicture, judge
from toolchain.check.report import CheckReport, Entry, Metrics, Picture
from toolchain.recipe import Bucket, Check, Recipe, Sampling, Tolerance
from toolchain.settings import ModelSettings

HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too' ]]> <!-- </style>"
LIMITS = Metrics(cosine=0.999, snr_db=60.0, max_error=0.01)
DIGEST = "0123456789abcdef" * 4
RECIPE = Recipe(
    name="sample",
    family="sd",
    buckets=(Bucket(1, 64, 64), Bucket(2, 64, 96)),
    sampling=Sampling(scheduler="euler", steps=20),
    check=Check((HOSTILE, "a red circle", "\U0001f98a ünï"), psnr_db=40, components={"denoiser": Tolerance(snr_db=50)}),
)


def entry(component: str, bucket: str, text: str, snr_db: float, evaluation: int | None = None) -> Entry:
    finite = not math.isnan(snr_db)
    failed = () if snr_db >= 60 else ("snr_db",) if finite else ("cosine", "snr_db", "max_error", "finite")
    metrics = Metrics(0.99999, snr_db, 1e-4) if finite else Metrics(math.nan, math.nan, math.nan)
    return Entry(component, bucket, text, "output", metrics, LIMITS, failed, evaluation)


def picture(prompt: str, noise: float, size: tuple[int, int] = (64, 96), *, finite: bool = True) -> Picture:
    """A picture that differs from the reference by `noise` levels."""
    random = np.random.default_rng(0)
    reference = random.integers(60, 190, (*size, 3)).astype(np.uint8)
    compiled = (reference + np.sign(random.standard_normal((*size, 3))) * noise).astype(np.uint8)
    return judge(CompiledPicture(prompt, 7, compiled, finite), reference, RECIPE.picture_limits)


def report(entries: list[Entry], pictures: list[Picture]) -> CheckReport:
    return CheckReport(
        bundle="out/sample",
        recipe="sample",
        model="owner/name",
        revision="c0ffee",
        backend="onnxruntime",
        device={"kind": "cpu", "cpu": "x86_64-avx512"},
        versions={"torch": "2.13.0"},
        warnings=("the denoiser's weights are not those that the bundle was built from",),
        entries=tuple(entries),
        pictures=tuple(pictures),
        limits={"psnr_db": 40.0, "ssim": 0.98},
    )


def passing() -> CheckReport:
    curve = [entry("denoiser", "1x64x64", f"prompt 1, evaluation {i} of 20", 100 - i, i) for i in (1, 4, 10, 20)]
    others = [entry("text_encoder", "any", "prompt 1", 130.0), entry("vae_encoder", "1x64x64", "prompt 1", math.inf)]
    sampler = Entry("sampler", "any", "euler/20", "trajectory", Metrics(max_error=1e-7), Metrics(max_error=1e-5), ())
    return report([sampler, *others, *curve], [picture("a red circle", 0), picture("a blue square", 1)])


def failing() -> CheckReport:
    """A curve that crosses its limit, an encoder that makes NaN, bad pictures and one whose prompt is markup."""
    curve = [entry("denoiser", "1x64x64", f"prompt 1, evaluation {i} of 20", 75 - 2 * i, i) for i in (1, 4, 10, 20)]
    broken = [entry("text_encoder", "any", "prompt 1", 130.0), entry("text_encoder", "any", "prompt 2", math.nan)]
    blank = picture("a blank one", 0)
    blank = replace(blank, psnr_db=5.0, ssim=math.nan, failed=("psnr_db", "ssim", "finite", "not blank"))
    pictures = [picture("a good one", 1), picture(HOSTILE, 30), blank, picture("a middling one", 10)]
    return report([*broken, *curve], pictures)


def bundle() -> Bundle:
    return Bundle(
        path=Path("out/sample"),
        model={"name": "owner/name", "revision": "c0ffee", "pipeline": "StableDiffusionPipeline"},
        family="sd",
        settings=ModelSettings.__new__(ModelSettings),  # nothing of them is shown
        recipe=RECIPE,
        backend="onnxruntime",
        device={"kind": "cpu"},
        engines={},
        samplers={},
        tokenizers={},
        files={
            "engines/denoiser/<b>.onnx": FileEntry(DIGEST, 1234567),
            "samplers/euler-20.json": FileEntry("f" * 64, 9),
        },
        artifacts={},
        tools={"onnx": "1.23"},
    )
