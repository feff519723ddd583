"""Kernels that TensorRT for RTX finished on this GPU, kept for the next start: without them it takes seconds again.

One file for each plan, GPU and driver in the user's cache folder. Kernels are machine code, as plans are, and trusted
as these are: a plan is opened where its user built it or a trusted key signed it, and the folder that says what was
built here is the one that holds the kernels. A file that is damaged, or of another plan, GPU or driver, is thrown away
with a warning; TensorRT itself compares more, such as versions of its own parts, and may refuse a file too.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from toolchain.errors import StoreError
from toolchain.store.files import store_errors, write_atomic
from toolchain.store.user_cache import cache_folder

log = logging.getLogger("toolchain")

MAGIC = b"diffbuild runtime cache 1\n"


class RuntimeCache:
    """The cache of one plan on one GPU. `facts` say which ones: a file of others is not read."""

    def __init__(self, config: Any, facts: Mapping[str, str]) -> None:
        """Puts a cache into a runtime config, with the kernels that lie on the disk if they fit."""
        self._facts = json.dumps(facts, sort_keys=True).encode() + b"\n"
        self._cache = config.create_runtime_cache()
        self._saved = self._load()
        config.set_runtime_cache(self._cache)

    @property
    def path(self) -> Path:
        """StoreError where there is no cache folder."""
        return cache_folder() / "kernels" / f"{hashlib.sha256(self._facts).hexdigest()[:32]}.cache"

    def save(self) -> None:
        """Writes the kernels down, if there are others than at the last time. What cannot be kept costs a warning."""
        kernels = bytes(memoryview(self._cache.serialize()))
        digest = hashlib.sha256(kernels).hexdigest()
        if not kernels or digest == self._saved:
            return
        try:
            write_atomic(self.path, MAGIC + self._facts + digest.encode() + b"\n" + kernels)
            self._saved = digest
        except StoreError as error:
            log.warning("finished kernels are not kept: %s: %s", error.what, error.where)

    def _load(self) -> str:
        """Hands the kernels of the disk over. Their sha256; empty where there are none that fit."""
        try:
            with store_errors("cannot read finished kernels", self.path):
                content = self.path.read_bytes()
        except StoreError as error:
            if not isinstance(error.__cause__, FileNotFoundError):
                log.warning("%s: %s", error.what, error.where)
            return ""
        reason, digest, kernels = self._split(content)
        if reason is None and not self._cache.deserialize(kernels):
            reason = "TensorRT for RTX does not take them"
        if reason is not None:
            log.warning("finished kernels are thrown away: %s: %s", self.path, reason)
            self._cache.reset()
            return ""
        return digest

    def _split(self, content: bytes) -> tuple[str | None, str, bytes]:
        """Why a file's content is none of this cache, or None; the digest and the kernels in it."""
        magic, facts, digest, kernels = [*content.split(b"\n", 3), b"", b"", b""][:4]
        if magic + b"\n" != MAGIC:
            return "it is no file of kernels", "", b""
        if hashlib.sha256(kernels).hexdigest().encode() != digest:
            return "its content was changed", "", b""
        if facts + b"\n" != self._facts:
            return f"they are for {facts.decode(errors='replace')}", "", b""
        return None, digest.decode(), kernels
