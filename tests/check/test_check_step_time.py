"""What a build says of the time of a step with quantisation and without."""

from __future__ import annotations

import pytest

from toolchain.check.step_time import describe
from toolchain.recipe import Quantize

INT8 = Quantize("int8")


@pytest.mark.parametrize(
    ("ours_ms", "saved", "expected"),
    [
        (
            160.0,
            40e6,
            "int8 is not faster here: a step takes 1.60 times as long as in float32 (160.0 ms, 100.0 ms), as weights "
            "are widened in every step; it saves 40 MB of the denoiser's files",
        ),
        (
            50.0,
            40e6,
            "int8 is faster here: a step takes 0.50 times as long as in float32 (50.0 ms, 100.0 ms); it saves 40 MB of "
            "the denoiser's files",
        ),
        (
            98.0,  # what two runs of one engine may differ by
            0.0,
            "int8 is not faster here: a step takes 0.98 times as long as in float32 (98.0 ms, 100.0 ms), as weights "
            "are widened in every step; it saves no space",
        ),
    ],
)
def test_it_is_said_in_words(ours_ms: float, saved: float, expected: str) -> None:
    assert describe(INT8, "float32", ours_ms, 100.0, int(saved)) == expected


def test_products_in_int8_widen_nothing() -> None:
    said = describe(Quantize("int8", activations="int8"), "float16", 100.0, 100.0, 0)
    assert said.startswith("int8 is not faster here: a step takes 1.00 times as long as in float16 ")
    assert "widened" not in said
