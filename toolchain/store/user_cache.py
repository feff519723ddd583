"""The folder for what all builds of a user share."""

from __future__ import annotations

import os
from pathlib import Path

from toolchain.errors import StoreError

ELSEWHERE = "set DIFFBUILD_CACHE to a folder that you may write to"


def cache_folder() -> Path:
    """$DIFFBUILD_CACHE, or `diffbuild` in the user's cache folder. StoreError where there is no home."""
    chosen = os.environ.get("DIFFBUILD_CACHE")
    if chosen:
        return Path(chosen).absolute()
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "diffbuild"
    except RuntimeError as error:  # a user whom the system does not know, as in some containers
        raise StoreError("there is no home folder", got=error, hint=ELSEWHERE) from error
