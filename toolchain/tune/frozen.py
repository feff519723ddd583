"""The tuned recipe as a file: every exception with the number that earned it."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from toolchain.recipe import Recipe
from toolchain.recipe.toml import Noted, toml

Notes = Mapping[str, str | Sequence[str]]
"""Dotted path of a key -> the comment behind it; of a list, one for each entry."""
NEEDED = ("family", "backend", "buckets", "classifier_free_guidance")
"""Keys that stand in every recipe, whatever their defaults."""


def write_recipe_text(recipe: Recipe, header: Sequence[str], notes: Notes) -> str:
    """The text of a recipe: paragraphs of comment, and its keys that are not at their defaults."""
    data = _changed(recipe.to_json(), recipe, "", notes)
    data.pop("name", None)
    about = "\n#\n".join(textwrap.fill(p, 120, initial_indent="# ", subsequent_indent="# ") for p in header)
    return f"{about}\n{toml(data)}\n"


def _changed(plain: Mapping[str, Any], value: Any, path: str, notes: Notes) -> dict[str, Any]:
    """The plain data of a dataclass with comments, without what is at its default and has none."""
    default = {f.name: _default(f) for f in fields(value)}
    kept: dict[str, Any] = {}
    for name, entry in plain.items():
        inner, key = getattr(value, name), f"{path}{name}"
        if inner == default[name] and key not in NEEDED and key not in notes:
            continue
        if is_dataclass(inner):
            kept[name] = _changed(entry, inner, f"{key}.", notes)
        elif isinstance(inner, Mapping):
            kept[name] = {k: _changed(entry[k], v, f"{key}.{k}.", notes) for k, v in inner.items()}
        else:
            kept[name] = _noted(entry, notes.get(key))
    return kept


def _default(field: Any) -> Any:
    """What a field of a dataclass holds where it is not given; an object that equals nothing where it must be."""
    if callable(field.default_factory):
        return field.default_factory()
    return field.default


def _noted(value: Any, note: str | Sequence[str] | None) -> Any:
    if note is None:
        return value
    if isinstance(note, str):
        return Noted(value, note)
    return [Noted(entry, text) if text else entry for entry, text in zip(value, note, strict=True)]
