"""The folders of a store.

    <stage>/<key>/manifest.json, files    a complete artifact; the key is the hash of its stage and inputs
    .locks/<key>                          one lock file per key, never deleted
    .tmp/<key>.*                          folders being built
    .partial/<key>                        what an interrupted build of a key did, for the next to go on from
    .quarantine/                          damaged entries that were moved aside
    .bundles.json                         the bundles that keep artifacts alive
    .stamps/                              digests of large files, by identity and times of the file

Names that this table does not list are ignored.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from toolchain.errors import StoreError
from toolchain.store.files import make_folder, store_errors, temporary_name
from toolchain.store.manifest import KEY, MANIFEST, STAGE


class Tree:
    """Paths below the root of a store."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def folder(self, stage: str, key: str) -> Path:
        """Where an artifact lies, or would. StoreError for what is no name of one."""
        if not STAGE.fullmatch(stage) or not KEY.fullmatch(key):
            raise StoreError(
                "not the name of an artifact", expected="stage/key, the key 64 hex digits", got=f"{stage}/{key}"
            )
        return self.root / stage / key

    def lock(self, name: str) -> Path:
        """The lock file of a key, or of the list of bundles."""
        return self.root / ".locks" / name

    def temporary(self, key: str) -> Path:
        """A new path for a folder of this key: to be built, or to be deleted."""
        return self.root / ".tmp" / temporary_name(key)

    def partial(self, key: str) -> Path:
        """The file in which an unfinished build of this key keeps what it did."""
        return self.root / ".partial" / key

    def entries(self) -> Iterator[tuple[str, str, Path]]:
        """(stage, key, folder) of every artifact's folder, complete or not."""
        with store_errors("cannot read the store", self.root):
            stages = sorted(self.root.iterdir()) if self.root.is_dir() else []
            for stage in (s for s in stages if STAGE.fullmatch(s.name) and s.is_dir()):
                for folder in sorted(stage.iterdir()):
                    if KEY.fullmatch(folder.name):
                        yield stage.name, folder.name, folder

    def set_aside(self, stage: str, key: str) -> Path:
        """Moves an entry into quarantine; its new path. Raises OSError."""
        aside = self.root / ".quarantine" / temporary_name(f"{stage}-{key}")
        make_folder(aside.parent)
        os.rename(self.folder(stage, key), aside)
        with suppress(OSError):
            os.utime(aside)  # it is evidence: `gc` counts its age from now
        return aside


def age_s(path: Path) -> float:
    """Seconds since an artifact was built or last reused; for anything else, since its last change."""
    newest = -math.inf
    for candidate in (path, path / MANIFEST):
        with suppress(FileNotFoundError, NotADirectoryError):
            newest = max(newest, os.lstat(candidate).st_mtime)
    return time.time() - newest
