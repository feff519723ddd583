"""The recipes that come with diffbuild, by name.

In a clone they lie in `recipes/` beside this package, in a wheel inside it: `pyproject.toml` maps one to the other.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from toolchain.recipe.schema import Recipe


@dataclass(frozen=True)
class ShippedRecipe:
    """A recipe that comes with diffbuild, and its first sentence."""

    recipe: Recipe
    about: str


def folder() -> Path:
    """The folder of the recipes' TOML files."""
    here = Path(__file__).parents[1]
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parent / "recipes"


def names() -> list[str]:
    """The names of the shipped recipes, sorted."""
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(recipe: Path) -> Path:
    """The file of a recipe: `recipe` itself or, where there is no such file, the shipped one of that name."""
    shipped = folder() / f"{recipe}.toml"
    is_name = len(recipe.parts) == 1 and not recipe.is_file()
    return shipped if is_name and shipped.is_file() else recipe


def about(name: str) -> str:
    """The description of a shipped recipe: the first sentence of its leading comment."""
    comment = []
    for line in (folder() / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")
