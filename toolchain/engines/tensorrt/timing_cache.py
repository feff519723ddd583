"""What all TensorRT builds of a user share: a lock on the GPU, and timing caches with the measured times of kernels.

One file per TensorRT version, GPU and optimization level, in TensorRT's own format. Two builds that end at the same
time lose nothing: each joins its measurements with what is there by then. A cache decides how long a build takes and
which of two equal kernels it picks, never what an engine computes; it is no part of an engine's key.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from toolchain.errors import StoreError
from toolchain.store.files import locked, store_errors, write_atomic
from toolchain.store.user_cache import ELSEWHERE, cache_folder

Combine = Callable[[bytes, bytes], bytes | None]
"""Two caches -> one that holds both, or None where they do not belong together."""


def timing_cache_path(tensorrt: str, gpu: str, level: int) -> Path:
    """Where measurements of one TensorRT version, GPU and builder_optimization_level lie."""
    name = re.sub(r"[^\w.-]+", "-", f"tensorrt-{tensorrt}-{gpu}-level-{level}")
    return cache_folder() / "timing" / f"{name}.cache"


@contextmanager
def only_builder(uuid: str, gpu: str) -> Iterator[None]:
    """Waits until no other process of this user builds on the GPU. StoreError.

    Kernels are chosen by how long they take: two builders on one GPU would measure each other.
    """
    with ExitStack() as held:
        try:
            lock = cache_folder() / "locks" / f"gpu-{uuid}"
            held.enter_context(locked(lock, wait=True, purpose=f"it builds an engine on the {gpu}"))
        except StoreError as error:
            raise StoreError(error.what, where=error.where, got=error.got, hint=ELSEWHERE) from error
        yield


def read_cache(path: Path) -> bytes:
    """The cache, empty where there is none yet. StoreError."""
    try:
        with store_errors("cannot read the timing cache", path):
            return path.read_bytes()
    except StoreError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            return b""
        raise


def merge_cache(path: Path, measured: bytes, combine: Combine) -> None:
    """Saves `measured` joined with the saved cache, which another build may have written meanwhile.

    One that cannot be joined, of another CUDA version say, is replaced. The lock file stays. StoreError.
    """
    with locked(path.with_suffix(".lock"), wait=True, purpose="it writes TensorRT's timing cache"):
        saved = read_cache(path)
        joined = combine(saved, measured) if saved else measured
        if joined is None:
            joined = measured
        if joined != saved:
            write_atomic(path, joined)
