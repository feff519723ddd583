"""`diffbuild tune`: how much of a model can be quantised, measured."""

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

if TYPE_CHECKING:
    from toolchain.tune.result import Tuned

new_file = click.Path(dir_okay=False, path_type=Path)


@click.command(
    epilog=examples(
        "diffbuild tune mine.toml --model ./model --budget 'psnr_db>=35' --output tuned.toml",
        "diffbuild tune mine.toml --model ./model --budget 'ssim>=0.9' -o tuned.toml --html tune.html",
    )
)
@recipe_argument
@model_option
@origin_options
@store_option
@click.option(
    "--budget", multiple=True, metavar="METRIC>=LIMIT", help="What must be kept: psnr_db, median_psnr_db, ssim, cosine."
)
@click.option("--output", "-o", required=True, type=new_file, metavar="FILE.toml", help="The new recipe.")
@click.option("--prompts", type=click.IntRange(1), help="How many of the recipe's are drawn.  [default: all]")
@click.option("--by", type=click.Choice(["layer", "block"]), default="layer", show_default=True, help="What is left.")
@click.option("--html", type=new_file, metavar="FILE.html", help="Also write a page with pictures and charts.")
@json_option
@verbosity
def tune(recipe: Path, model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Measure what quantising each layer costs, and write a recipe that keeps a budget.

    Draws pictures with real engines, so that the machine must be one that runs them. What was measured is kept in the
    store: after an interruption the same command goes on where it stopped. Exit code 3 when no share keeps the budget.
    """
    with progress.working(f"tuning {recipe} for {model}") as say:
        tuned = api.tune_recipe(recipe, model, output, **options, progress=say)
    answer(as_json, tuned.to_json, lambda: _lines(tuned, output, model))


def _lines(tuned: Tuned, output: Path, model: str) -> Iterator[str]:
    yield from tuned.lines()
    yield f"{output}: written"
    yield f"next: diffbuild build {output} --model {model} --output bundle"
