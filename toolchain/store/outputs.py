"""Where a command may write a file: asked before any work is done."""

from __future__ import annotations

import itertools
import os
from collections.abc import Mapping
from pathlib import Path

from toolchain.errors import UsageError


def check_output(path: str | Path | None) -> None:
    """Raises UsageError for a path at which no file can be written; None stands for a file in the working directory."""
    target = None if path is None else Path(path)
    folder = Path() if target is None else target.parent
    if target is not None and target.is_dir():
        raise UsageError("the output is a folder", where=path, expected="a file", hint=f"such as {target / 'a.png'}")
    if target is not None and target.exists() and not target.is_file():
        # Replaced by a rename, a device or a pipe would be gone.
        raise UsageError("the output is not a regular file", where=path, expected="a new or a regular file")
    if not folder.is_dir():
        raise UsageError("the folder of the output is missing", where=folder, hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("the folder of the output is not writable", where=folder, hint="choose another --output")


def check_new_file(path: Path) -> None:
    """`check_output` for a recipe, which a user may have changed: it is never replaced. Raises UsageError."""
    check_output(path)
    if path.exists():
        raise UsageError("the recipe file exists already", where=path, hint="choose another --output, or delete it")


def check_outputs(report: str | Path | None, html: str | Path | None) -> None:
    """`check_output` for the two files of a check, which must not be one. Raises UsageError."""
    check_output(report)
    check_output(html)
    check_apart({"--report": report, "--html": html})


def check_apart(files: Mapping[str, str | Path | None]) -> None:
    """Raises UsageError where one file is named twice; `files` are what names each -> its path, None where nothing."""
    named = {name: Path(path).resolve() for name, path in files.items() if path is not None}
    for (first, one), (second, other) in itertools.combinations(named.items(), 2):
        if one == other:
            raise UsageError(f"{first} and {second} name the same file", where=files[second], expected="two files")
