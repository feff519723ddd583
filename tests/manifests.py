"""A bundle's manifest, changed by somebody who gives it the right digest again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain.bundle.bundle import MANIFEST, encode


def edit_manifest(bundle: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """`change` is given what `bundle.json` holds, without its digest."""
    path = bundle / MANIFEST
    data = json.loads(path.read_text())
    del data["digest"]
    change(data)
    path.write_bytes(encode(data))
