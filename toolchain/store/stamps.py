"""Digests of large files, remembered for as long as the files stay as they are."""

from __future__ import annotations

import hashlib
import os
import time
from contextlib import suppress
from pathlib import Path

from toolchain.errors import StoreError
from toolchain.store.files import file_digest, store_errors, write_atomic

# A file changed within one tick of the filesystem's clock keeps its times: only files older than this are stamped.
_SETTLED_NS = 2_000_000_000


def stamped_digest(path: Path, stamps: Path) -> str:
    """`file_digest`, remembered in the folder `stamps` while device, inode, size and times of the file stay the same.

    A lost or damaged stamp only costs the time to read the file again. StoreError when the file cannot be read.
    """
    before = _identity(path)
    stamp = stamps / hashlib.sha256(before.encode()).hexdigest()
    with suppress(OSError, ValueError):
        digest, check = stamp.read_text("ascii").split()
        if check == hashlib.sha256(f"{before} {digest}".encode()).hexdigest():
            return digest
    settled = time.time_ns() - max(int(t) for t in before.split()[3:]) > _SETTLED_NS
    digest = file_digest(path)
    if settled and _identity(path) == before:
        check = hashlib.sha256(f"{before} {digest}".encode()).hexdigest()
        with suppress(StoreError):
            write_atomic(stamp, f"{digest} {check}\n".encode())
    return digest


def _identity(path: Path) -> str:
    with store_errors("cannot read a file", path):
        s = os.stat(path)
    return f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"
