"""The recipes that come with diffbuild, by name.

A clone has them in `recipes/` beside this package, a wheel in it: `pyproject.toml` maps the one to the other.
"""

from __future__ import annotations

from pathlib import Path


def folder() -> Path:
    here = Path(__file__).parents[1]
    installed = here / "recipes"
    return installed if installed.is_dir() else here.parent / "recipes"


def names() -> list[str]:
    return sorted(path.stem for path in folder().glob("*.toml"))


def find(recipe: Path) -> Path:
    """The file of a recipe: `recipe` itself or, where there is no such file, the shipped one of that name."""
    shipped = folder() / f"{recipe}.toml"
    is_name = len(recipe.parts) == 1 and not recipe.is_file()
    return shipped if is_name and shipped.is_file() else recipe


def about(name: str) -> str:
    """What a shipped recipe says of itself: the first sentence of the comment at its beginning."""
    comment = []
    for line in (folder() / f"{name}.toml").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return " ".join(comment).partition(". ")[0].rstrip(".")
