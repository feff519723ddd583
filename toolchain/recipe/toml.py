"""Writing TOML: Python's own library only reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LINE = 100


@dataclass(frozen=True)
class Noted:
    """A value, or an entry of a list, with a comment behind it."""

    value: Any
    note: str


def toml(data: Mapping[str, Any], path: str = "") -> str:
    """Plain data as TOML, with comments where values are `Noted`: a table's own keys first, then the tables in it.

    TOML has no null: such keys are left out.
    """
    lines = [f"{_key(k)} = {_value(v)}" for k, v in data.items() if v is not None and not isinstance(v, Mapping)]
    parts = ["\n".join([*([f"[{path}]"] if path and lines else []), *lines])]
    parts += [toml(v, f"{path}.{_key(k)}" if path else _key(k)) for k, v in data.items() if isinstance(v, Mapping)]
    return "\n\n".join(part for part in parts if part)


def _value(value: Any) -> str:
    """In one line, but for lists of long texts or with comments."""
    if isinstance(value, Noted):
        return _value(value.value) + _comment(value)
    if not isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    if not any(isinstance(entry, Noted) for entry in value):
        text = json.dumps(value, ensure_ascii=False)
        if len(text) <= LINE:
            return text
    return "\n".join(["[", *(f"  {_entry(entry)}" for entry in value), "]"])


def _entry(entry: Any) -> str:
    if isinstance(entry, Noted):
        return f"{_value(entry.value)},{_comment(entry)}"
    return f"{_value(entry)},"


def _comment(noted: Noted) -> str:
    return f"  # {' '.join(noted.note.split())}"


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)
