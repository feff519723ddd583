"""`diffbuild recipes`, `init` and `recipe check`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain import api
from toolchain.cli.console import (
    answer,
    examples,
    json_option,
    model_option,
    origin_options,
    recipe_argument,
    verbosity,
)
from toolchain.terminal import table

if TYPE_CHECKING:
    from toolchain.builder.starter import WrittenRecipe
    from toolchain.recipe import Recipe
    from toolchain.recipe.shipped import ShippedRecipe

BACKENDS = ("onnxruntime", "onnxruntime_cuda", "openvino", "tensorrt", "tensorrt_rtx")


@click.command(epilog=examples("diffbuild recipes", "diffbuild recipes --json"))
@json_option
@verbosity
def recipes(as_json: bool) -> None:
    """List the recipes that come with diffbuild, which go by their names.

    For each its family, backend, precision, and whether its engines run on a CPU or a GPU.
    """
    listed = api.shipped_recipes()
    answer(as_json, lambda: _recipes_json(listed), lambda: _recipes_lines(listed))


@click.command(
    epilog=examples("diffbuild init --model ./model", "diffbuild init --model owner/name --output mine.toml")
)
@model_option
@origin_options
@click.option("--backend", type=click.Choice(BACKENDS), help="Of the engines.  [default: the fastest that runs here]")
@click.option(
    "--output", "-o", type=click.Path(path_type=Path), metavar="FILE.toml", help="[default: the model's name, .toml]"
)
@json_option
@verbosity
def init(model: str, output: Path | None, as_json: bool, **options: Any) -> None:
    """Write a recipe for this machine and a model.

    Starts from the shipped recipe that comes nearest, with the model's native size and types that the backend supports.
    Needs the model's config files and nothing else.
    """
    written = api.write_recipe(model, output, **options)
    document = {"recipe": str(written.path), "like": written.like, **written.recipe.to_json()}
    answer(as_json, lambda: document, lambda: _init_lines(written, model))


@click.group("recipe", epilog=examples("diffbuild recipe check mine.toml --model ./model"))
def recipe_group() -> None:
    """Check a recipe of your own."""


@recipe_group.command(
    "check", epilog=examples("diffbuild recipe check mine.toml", "diffbuild recipe check mine.toml --model owner/name")
)
@recipe_argument
@click.option("--model", metavar="DIR_OR_HUB_ID", help="Also check whether the recipe fits this model.")
@origin_options
@json_option
@verbosity
def recipe_check(recipe: Path, model: str | None, as_json: bool, **origin: Any) -> None:
    """Check a recipe, without its engines' library.

    Names every problem at once. With --model, whose config files are enough, also what does not fit the model.
    """
    checked = api.check_recipe_file(recipe, model, **origin)
    answer(as_json, lambda: {"model": model, "recipe": checked.to_json()}, lambda: _valid_lines(checked, model))


def _runs_on(recipe: Recipe) -> str:
    if recipe.backend == "openvino":
        return {"CPU": "CPU", "GPU": "Intel GPU", "NPU": "Intel NPU"}[recipe.openvino.device]
    return "CPU" if recipe.backend == "onnxruntime" else "NVIDIA GPU"


def _recipes_json(listed: Sequence[ShippedRecipe]) -> dict[str, Any]:
    entries = [{"about": s.about, "runs_on": _runs_on(s.recipe), **s.recipe.to_json()} for s in listed]
    return {"recipes": entries}


def _recipes_lines(listed: Sequence[ShippedRecipe]) -> Iterator[str]:
    recipes = [entry.recipe for entry in listed]
    rows = [[r.name, r.family, r.backend, _runs_on(r), r.precisions] for r in recipes]
    yield from table(rows, head=["recipe", "family", "backend", "runs on", "precision"], indent="")
    yield "next: diffbuild plan RECIPE --model DIR_OR_HUB_ID"


def _init_lines(written: WrittenRecipe, model: str) -> Iterator[str]:
    path, recipe = written.path, written.recipe
    facts = ", ".join([f"family {recipe.family}", recipe.backend, recipe.precisions, str(recipe.buckets[0])])
    yield f"{path}: {facts}; after {written.like}"
    yield f"next: diffbuild plan {path} --model {model}"


def _valid_lines(recipe: Recipe, model: str | None) -> Iterator[str]:
    fit = "not checked against a model (--model does)" if model is None else f"it fits {model}"
    counts = f"buckets: {len(recipe.buckets)}, sampler tables: {len(recipe.sampling.tables)}"
    yield f"{recipe.name} is a valid recipe: family {recipe.family}, {recipe.backend}, {counts}; {fit}"
