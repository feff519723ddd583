"""A recipe file, or a shipped recipe's name -> Recipe."""

from __future__ import annotations

import re
from pathlib import Path

from toolchain.errors import RecipeError
from toolchain.recipe import shipped
from toolchain.recipe.reading import nearest, structure
from toolchain.recipe.schema import Recipe


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file, or a shipped recipe by its name.

    RecipeError when it cannot be read, is not TOML, or holds anything but a recipe.
    """
    path = shipped.find(Path(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # Windows' editors begin a file with a byte-order mark
    except UnicodeDecodeError as error:
        got = f"byte {error.object[error.start]:#04x} at offset {error.start}"
        raise RecipeError("the recipe is not text", where=path, expected="TOML in UTF-8", got=got) from error
    except OSError as error:
        expected = "a TOML file, or the name of a recipe that comes with diffbuild"
        raise RecipeError(
            "the recipe cannot be read", where=path, expected=expected, got=error.strerror, hint=_nearby(path)
        ) from error
    return parse_recipe(text, path.stem, str(path))


def parse_recipe(text: str, name: str, where: str) -> Recipe:
    """TOML text -> Recipe called `name`; `where` is what the errors call the text. RecipeError with every problem."""
    import tomllib  # here, because a runtime that reads a bundle's JSON has no use for it

    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        at = re.search(r" \(at line (\d+), column (\d+)\)$", str(error))
        what = f"the recipe is not TOML: {str(error)[: at.start()] if at else error}"
        raise RecipeError(what, where=":".join([where, *(at.groups() if at else ())])) from error
    recipe: Recipe = structure(Recipe, data, name, where=where)
    return recipe


def _nearby(path: Path) -> str:
    """A hint: the recipes in the folder that was searched, and the nearest shipped one."""
    folder = path if path.is_dir() else path.parent
    folders = [p for p in (folder, folder / "recipes") if p.is_dir() and p.resolve() != shipped.folder()]
    files = [str(file) for p in folders for file in sorted(p.glob("*.toml")) if file.name != "pyproject.toml"]
    listed = [f"recipes nearby: {', '.join(files[:20])}"] if files else []
    listed.append(f"diffbuild recipes lists those that come with it{nearest(path.stem, shipped.names())}")
    return "; ".join(listed)
