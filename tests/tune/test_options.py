"""Which options a tuning takes: of least error, unless the plain ones draw better pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.tiny import recipe_for
from toolchain.recipe import Quantize
from toolchain.tune.candidates import plain_tables, with_tables
from toolchain.tune.pictures import Measured, Request
from toolchain.tune.result import Point, Trial, Tuned
from toolchain.tune.run import _of_pictures
from toolchain.tune.writing import with_text

CHOSEN = {"denoiser": Quantize("int8", activations="int8", ranges="mean", smoothing=0.5, scales="mse")}


class Drawn:
    """Stands for drawings: a PSNR by the method of the denoiser's ranges."""

    def __init__(self, **psnr_db: float) -> None:
        self.psnr_db = psnr_db

    def measure(self, recipe: Any, request: Request, label: str) -> Measured:
        psnr = self.psnr_db[recipe.component("denoiser").quantize.ranges]
        return Measured((psnr, psnr + 1), (1.0, 1.0), None, 1.0, Path())


def test_plain_options() -> None:
    assert plain_tables(CHOSEN) == {"denoiser": Quantize("int8", activations="int8")}
    kept = {"denoiser": Quantize("int4", exclude=("a",), block_size=64)}
    assert plain_tables(kept) == kept


@pytest.mark.parametrize(
    ("mean", "largest", "ranges"), [(40.0, 37.0, "mean"), (37.0, 40.0, "max"), (38.0, 38.0, "max")]
)
def test_pictures_decide(mean: float, largest: float, ranges: str) -> None:
    drawings: Any = Drawn(mean=mean, max=largest)
    tables = _of_pictures(drawings, recipe_for("denoiser"), CHOSEN, Request(("a",), (0,)))
    assert tables == (CHOSEN if ranges == "mean" else plain_tables(CHOSEN))


@pytest.mark.parametrize(("ranges", "more"), [("mean", ""), ("max", ": but pictures are better with this")])
def test_the_recipe_tells_the_errors_of_all(ranges: str, more: str, tmp_path: Path) -> None:
    trials = tuple(Trial("denoiser", "ranges", value, error) for value, error in (("max", 2e-5), ("mean", 1e-5)))
    table = {"denoiser": Quantize("int8", activations="int8", ranges=ranges)}
    measured = Measured((40.0,), (1.0,), None, 1.0, tmp_path)
    tuned = Tuned(
        recipe=with_tables(recipe_for("denoiser"), table),
        model="m",
        backend="onnxruntime",
        budget={"psnr_db": 30.0},
        prompts=1,
        seeds=(0,),
        trials=trials,
        chosen=Point(0, 0.9, measured),
        held_out=measured,
    )
    assert f'ranges = "{ranges}"  # error max 2e-05, mean 1e-05{more}\n' in with_text(tuned).text
