"""`diffbuild calibrate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain import api
from toolchain.cli import progress
from toolchain.cli.console import (
    answer,
    examples,
    json_option,
    model_option,
    origin_options,
    recipe_argument,
    store_option,
    verbosity,
)
from toolchain.cli.text import megabytes

if TYPE_CHECKING:
    from toolchain.weights.range_file import RangeFile


@click.command(epilog=examples("diffbuild calibrate mine.toml --model ./model --output ranges.safetensors"))
@recipe_argument
@model_option
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The new file.")
@origin_options
@store_option
@json_option
@verbosity
def calibrate(recipe: Path, model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Write the ranges of a model's activations to a file.

    Draws the prompts of the recipe's table [calibration] without quantisation, and keeps how large the input of every
    convolution and linear layer got. After an interruption the same command goes on where it stopped.
    """
    with progress.steps() as shown:
        ranges = api.calibrate(
            recipe, model, output, **options, on_plan=shown.begin, progress=shown, within=shown.within
        )
    answer(as_json, lambda: calibrate_json(ranges, shown), lambda: calibrate_lines(ranges, shown))


def calibrate_json(ranges: RangeFile, shown: progress.Steps) -> dict[str, Any]:
    """The document of `calibrate`."""
    return {
        "output": str(ranges.path),
        "bytes": ranges.path.stat().st_size,
        "weights": {component: len(by_weight) for component, by_weight in ranges.components.items()},
        "drawn": dict(ranges.about),
        "built": shown.built,
        "seconds": shown.seconds,
    }


def calibrate_lines(ranges: RangeFile, shown: progress.Steps) -> Iterator[str]:
    """What `calibrate` prints when it is done."""
    about, size = ranges.about, megabytes(ranges.path.stat().st_size)
    yield f"{ranges.path}: {size}, {shown.built} steps built, {shown.seconds:.1f} s"
    how = f"{about['steps']} steps of {about['scheduler']}, guidance {about['guidance']:g}, {about['bucket']}"
    yield f"drawn by {about['backend']}: {about['pictures']} pictures, {how}"
    for component, by_weight in ranges.components.items():
        yield f"{component}: ranges of the inputs of {len(by_weight)} weights, in {about['dtypes'][component]}"
