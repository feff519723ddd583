"""What `pack.py` brought along: archives in pieces, joined, compared with their digests, and unpacked."""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import Any

MANIFEST = "packs.json"


def manifest(packed: Path) -> dict[str, Any]:
    """Name of a pack -> its folder and pieces; empty where nothing was brought: then it is installed, or missing."""
    found = sorted(packed.glob(f"call-*/{MANIFEST}"))
    packs: dict[str, Any] = json.loads(found[-1].read_text()) if found else {}
    return packs


def lacking(packed: Path, pack: dict[str, Any]) -> list[str]:
    """Pieces that have not come yet."""
    return [piece["name"] for piece in pack["pieces"] if not list(packed.glob(f"call-*/{piece['name']}"))]


def unpack(packed: Path, name: str, pack: dict[str, Any]) -> bool:
    """Unpacks what is complete into its folder; whether there was anything to do. ValueError for a changed piece."""
    digests = " ".join(piece["sha256"] for piece in pack["pieces"])
    done = packed / "unpacked" / f"{name}.done"
    if done.is_file() and done.read_text() == digests:
        return False
    done.parent.mkdir(exist_ok=True)
    joined = packed / "unpacked" / f"{name}.zip"
    with joined.open("wb") as whole:
        for piece in pack["pieces"]:
            data = next(iter(packed.glob(f"call-*/{piece['name']}"))).read_bytes()
            if hashlib.sha256(data).hexdigest() != piece["sha256"]:
                raise ValueError(f"{piece['name']} is not what was packed")
            whole.write(data)
    with zipfile.ZipFile(joined) as archive:
        archive.extractall(packed / "unpacked" / pack["folder"])
    joined.unlink()
    done.write_text(digests)
    return True
