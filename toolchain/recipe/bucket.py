"""Buckets: the shapes that a recipe compiles."""

from __future__ import annotations

import re
from dataclasses import dataclass

from toolchain.errors import RecipeError

BUCKET_FORM = 'batch x height x width in pixels, such as "1x512x768", sizes in multiples of 8'


@dataclass(frozen=True, order=True)
class Bucket:
    """One shape that is compiled: pictures per run, height and width in pixels. Written "1x512x768"."""

    batch: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.height}x{self.width}"

    @classmethod
    def parse(cls, text: str) -> Bucket:
        """RecipeError unless `text` is a bucket. The exact size factor is the family's to check; 8 divides them all."""
        problem = bucket_problem(text)
        if problem:
            raise RecipeError(f"bucket: {problem}", expected=BUCKET_FORM, got=repr(text))
        return cls(*map(int, text.split("x")))


BUCKET_SETS = {
    # The sizes near a megapixel that SDXL was trained with, squarest first.
    "sdxl-aspect-ratios": (
        "1x1024x1024", "1x896x1152", "1x1152x896", "1x832x1216", "1x1216x832", "1x768x1344", "1x1344x768",
        "1x640x1536", "1x1536x640",
    ),
}  # fmt: skip
"""Lists of buckets with a name: what `buckets` may be in place of a list."""


def bucket_problem(text: str) -> str | None:
    """Why `text` is not a bucket; None where it is one."""
    if not re.fullmatch(r"-?[0-9]{1,9}x-?[0-9]{1,9}x-?[0-9]{1,9}", text):
        return "not a bucket"
    batch, height, width = sizes = tuple(map(int, text.split("x")))
    if min(sizes) < 1:
        return "not positive"
    if height % 8 or width % 8:
        return "not a multiple of 8"
    # One spelling per bucket: "01x64x64" would be a second name of the same files.
    return None if text == f"{batch}x{height}x{width}" else "not a bucket"
