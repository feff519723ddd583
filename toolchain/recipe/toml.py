"""Writing TOML: Python's own library only reads it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

LINE = 100


def toml(data: Mapping[str, Any], path: str = "") -> str:
    """Plain data as TOML: a table's own keys first, then the tables in it. TOML has no null: such keys are left out."""
    lines = [f"{_key(k)} = {_value(v)}" for k, v in data.items() if v is not None and not isinstance(v, Mapping)]
    parts = ["\n".join([*([f"[{path}]"] if path and lines else []), *lines])]
    parts += [toml(v, f"{path}.{_key(k)}" if path else _key(k)) for k, v in data.items() if isinstance(v, Mapping)]
    return "\n\n".join(part for part in parts if part)


def _value(value: Any) -> str:
    """In one line, but for lists of long texts."""
    text = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, list) or len(text) <= LINE:
        return text
    return "\n".join(["[", *(f"  {json.dumps(entry, ensure_ascii=False)}," for entry in value), "]"])


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)
