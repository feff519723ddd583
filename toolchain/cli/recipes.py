"""Recipes on the command line: those that come with diffbuild, a first one of one's own, and whether one is sound."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain.cli import pictures
from toolchain.cli.console import (
    answer,
    examples,
    json_option,
    model_option,
    origin_options,
    recipe_argument,
    verbosity,
)
from toolchain.errors import UsageError
from toolchain.terminal import table

if TYPE_CHECKING:
    from toolchain.recipe import Recipe

BACKENDS = ("onnxruntime", "onnxruntime_cuda", "tensorrt", "tensorrt_rtx")


@click.command(epilog=examples("diffbuild recipes", "diffbuild recipes --json"))
@json_option
@verbosity
def recipes(as_json: bool) -> None:
    """List the recipes that come with diffbuild, which go by their names.

    For each its family, backend, precision, and whether its engines run on a CPU or a GPU.
    """
    from toolchain.recipe import load_recipe, shipped

    found = [(load_recipe(Path(name)), shipped.about(name)) for name in shipped.names()]
    answer(as_json, lambda: _recipes_json(found), lambda: _recipes_lines(found))


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
def init(model: str, backend: str | None, output: Path | None, as_json: bool, **origin: Any) -> None:
    """Write a recipe for this machine and a model.

    The recipe that comes nearest is cut to the model's own size and to what the backend computes in. Needs the model's
    config files and nothing else.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.builder.starter import best_backend, write_starter
    from toolchain.store.files import write_atomic

    target = output or Path(f"{Path(model).resolve().name}.toml")
    pictures.check_output(target)
    if target.exists():
        raise UsageError("the recipe is there already", where=target, hint="choose another --output, or delete it")
    made = write_starter(open_model(model, **origin, weights=False), backend or best_backend(), target.stem)
    write_atomic(target, made.text.encode())
    answer(
        as_json,
        lambda: {"recipe": str(target), "like": made.like, **made.recipe.to_json()},
        lambda: _init_lines(target, made.like, made.recipe, model),
    )


@click.group("recipe", epilog=examples("diffbuild recipe check mine.toml --model ./model"))
def recipe_group() -> None:
    """Look after a recipe."""


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
    from toolchain.api import check_recipe_file

    found = check_recipe_file(recipe, model, **origin)
    answer(as_json, lambda: {"model": model, "recipe": found.to_json()}, lambda: _sound_lines(found, model))


def _runs_on(recipe: Recipe) -> str:
    return "CPU" if recipe.backend == "onnxruntime" else "NVIDIA GPU"


def _precisions(recipe: Recipe) -> str:
    """The denoiser's type, then what differs from it."""
    own = recipe.component("denoiser").dtype
    others = [f"{name} {part.dtype}" for name, part in recipe.components.items() if part.dtype != own]
    return ", ".join([own, *others])


def _recipes_json(found: Sequence[tuple[Recipe, str]]) -> dict[str, Any]:
    return {"recipes": [{"about": about, "runs_on": _runs_on(r), **r.to_json()} for r, about in found]}


def _recipes_lines(found: Sequence[tuple[Recipe, str]]) -> Iterator[str]:
    rows = [[r.name, r.family, r.backend, _runs_on(r), _precisions(r)] for r, _ in found]
    yield from table(rows, head=["recipe", "family", "backend", "runs on", "precision"], indent="")
    yield "next: diffbuild plan RECIPE --model DIR_OR_HUB_ID"


def _init_lines(path: Path, like: str, recipe: Recipe, model: str) -> Iterator[str]:
    yield f"{path}: family {recipe.family}, {recipe.backend}, {_precisions(recipe)}, {recipe.buckets[0]}; after {like}"
    yield f"next: diffbuild plan {path} --model {model}"


def _sound_lines(recipe: Recipe, model: str | None) -> Iterator[str]:
    held = "what only a model can tell was not looked at (--model does)" if model is None else f"it fits {model}"
    counts = f"buckets: {len(recipe.buckets)}, sampler tables: {len(recipe.sampling.tables)}"
    yield f"{recipe.name} is a sound recipe: family {recipe.family}, {recipe.backend}, {counts}; {held}"
