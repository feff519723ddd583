"""Which bundles this user built on this machine.

An engine of TensorRT is machine code, and one of OpenVINO may be, if it is not for a CPU: opening a bundle runs a
program. Bundles that were built here are recorded in the user's cache folder by the sha256 of their manifests, which
list the sha256 of every file. Any other needs a signature.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

from toolchain.bundle.bundle import Bundle
from toolchain.errors import StoreError
from toolchain.store.files import write_atomic
from toolchain.store.user_cache import cache_folder

log = logging.getLogger("toolchain")


def note_built(bundle: Bundle) -> None:
    """Records that a bundle was built here, if its engines are machine code; a warning where that cannot be written."""
    if not bundle.machine_code:
        return
    try:
        note = _note(bundle)
        if not note.exists():
            write_atomic(note, f"{os.path.abspath(bundle.path)}\n".encode())
    except (StoreError, OSError) as error:
        log.warning(
            "%s must be signed before it can be opened: it cannot be noted as built here (%s)", bundle.path, error
        )


def built_here(bundle: Bundle) -> bool:
    """Whether the bundle's manifest is recorded as built here."""
    try:
        return _note(bundle).exists()
    except (StoreError, OSError):
        return False  # no cache folder, or one that may not be read, and no notes


def _note(bundle: Bundle) -> Path:
    assert bundle.digest, "a bundle that was read knows its manifest's digest"
    return cache_folder() / "built" / bundle.digest
