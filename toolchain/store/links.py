"""Artifacts of a store where an engine is opened over them, without a copy."""

from __future__ import annotations

import os
import shutil
from pathlib import Path


def link_file(source: Path, target: Path) -> None:
    """A hard link in a scratch folder of the store, gone when the work is done, and only read; a copy where the
    filesystem has no links. Makes the folder of `target`."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
