"""Stage "model": a checkpoint in one file -> a diffusers folder."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.models.source import ModelSource


def write(checkpoint: Path, configs: ModelSource, pipeline: str, folder: Path) -> None:
    """Converts with the configs of `configs`, by diffusers' own converter. Raises ModelError."""
    from toolchain.models.single_file import convert

    convert(checkpoint, configs, pipeline, folder)
