"""Commands about recipes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.api.arguments import load, open_store

if TYPE_CHECKING:
    from toolchain.builder.starter import WrittenRecipe
    from toolchain.recipe import Recipe
    from toolchain.recipe.shipped import ShippedRecipe
    from toolchain.tune.result import Tuned


def shipped_recipes() -> list[ShippedRecipe]:
    """The recipes that come with diffbuild, by name."""
    from toolchain.recipe import load_recipe, shipped

    return [shipped.ShippedRecipe(load_recipe(Path(name)), shipped.about(name)) for name in shipped.names()]


def write_recipe(
    model: str | Path,
    output: str | Path | None = None,
    *,
    backend: str | None = None,
    revision: str | None = None,
    config: str | Path | None = None,
) -> WrittenRecipe:
    """Writes a first recipe for a model and this machine. Needs the model's config files alone.

    output   None: the model's name, .toml, in the working directory
    backend  None: the fastest that runs here

    Raises ModelError, and UsageError for an output that exists already or cannot be written.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.builder.starter import WrittenRecipe, write_starter
    from toolchain.engines.recommend import best_backend
    from toolchain.store.files import write_atomic
    from toolchain.store.outputs import check_new_file

    target = Path(output or f"{Path(model).resolve().name}.toml")
    check_new_file(target)
    source = open_model(model, revision, config=config, weights=False)
    starter = write_starter(source, backend or best_backend(), target.stem)
    write_atomic(target, starter.text.encode())
    return WrittenRecipe(target, starter.recipe, starter.like)


def check_recipe_file(
    recipe: Recipe | str | Path,
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
) -> Recipe:
    """Checks a recipe and returns it; with `model` also whether it fits that, of which the config files are enough.

    Needs no library of the engines. Raises RecipeError with every problem, ModelError and UsageError.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.builder.plan import check_patterns, check_recipe
    from toolchain.engines.builders import builder_of
    from toolchain.models.registry import family_of, named_family

    loaded = load(recipe)
    safety = loaded.safety.checker
    source = None if model is None else open_model(model, revision, config=config, weights=False, safety=safety)
    family = named_family(loaded.family) if source is None else family_of(source, loaded)
    check_recipe(loaded, family, builder_of(loaded.backend), source)
    if source is not None:
        check_patterns(loaded, source, family)
    return loaded


def tune_recipe(
    recipe: Recipe | str | Path,
    model: str | Path,
    output: str | Path,
    *,
    store: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Tuned:
    """Writes a recipe that quantises as much as keeps a budget, and goes on where it stopped.

    options  of `toolchain.tune.command.tune_to_file`

    Raises UsageError for a budget or an output, BudgetError where no recipe keeps it, and what `build` raises.
    """
    from toolchain.store.outputs import check_apart
    from toolchain.tune.command import tune_to_file

    if isinstance(recipe, str | Path):
        check_apart({"RECIPE": recipe, "--html": options.get("html")})
    return tune_to_file(load(recipe), model, Path(output), open_store(store), progress, **options)
