"""What commands are given, as what they work with."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.recipe import Recipe
    from toolchain.store.artifacts import Store


def load(recipe: Recipe | str | Path) -> Recipe:
    """A recipe, or the one in a file or of a name. Raises RecipeError."""
    from toolchain.recipe import Recipe, load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def open_store(store: str | Path | None) -> Store:
    """The store at a path, of the environment, or ./artifacts. Raises StoreError."""
    from toolchain.store.artifacts import Store, default_store

    return Store(Path(store or default_store()))
