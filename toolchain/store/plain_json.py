"""JSON as other programs read it: one rule for the numbers that JSON lacks, in every document and report.

Infinities and NaN are the strings "inf", "-inf" and "nan". null means that there is no such number, never that a number
could not be written. `float` of Python reads the strings back.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any


def plain(value: Any) -> Any:
    """`value` for a JSON document: tuples as lists, paths as text, non-finite numbers as above."""
    if isinstance(value, float):
        return value if math.isfinite(value) else str(float(value))
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    return str(value) if isinstance(value, PurePath) else value


def encode(value: Any, *, indent: int | None = 1) -> str:
    """The JSON text of a value, in ASCII, without a line's end. TypeError for a value that is none of JSON's."""
    return json.dumps(plain(value), indent=indent, allow_nan=False)
