"""Pinned host memory through which data goes to the GPU and back, so that copies need not wait for each other."""

from __future__ import annotations

import ctypes
from math import prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.cuda.driver import ALLOCATION, call, cudart

ALIGNMENT = 256
"""Bytes: what TensorRT asks of addresses, and what cudaMalloc gives."""
CHUNK_BYTES = 4 << 20
STAGED_BYTES = 256 << 20
"""The most that may be staged before the GPU is waited for."""


class PinnedStaging:
    """A bump allocator over chunks of pinned memory. Arrays are handed out one after another and taken back all at
    once, after a synchronisation: until then a copy may still be reading or writing them.

    allocated_bytes  of all chunks, which are kept until `close`
    """

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self._chunks: list[NDArray[np.uint8]] = []
        self._used: list[int] = []  # bytes, by chunk
        self._staged_bytes = 0

    def is_full(self, nbytes: int) -> bool:
        """Whether so many bytes more would exceed what may be staged."""
        return self._staged_bytes + nbytes > STAGED_BYTES

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An uninitialised array that the GPU can copy from and to."""
        nbytes = prod(shape) * dtype.itemsize
        room = -(-nbytes // ALIGNMENT) * ALIGNMENT
        fits = (i for i, chunk in enumerate(self._chunks) if self._used[i] + room <= chunk.nbytes)
        index = next(fits, None)
        if index is None:
            index = self._grow(max(room, CHUNK_BYTES))
        start = self._used[index]
        self._used[index] += room
        self._staged_bytes += room
        return self._chunks[index][start : start + nbytes].view(dtype).reshape(shape)

    def _grow(self, nbytes: int) -> int:
        with ALLOCATION:
            address = call("cudaHostAlloc", nbytes, cudart().cudaHostAllocDefault)
        self.allocated_bytes += nbytes
        self._chunks.append(np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address)))
        self._used.append(0)
        return len(self._chunks) - 1

    def reset(self) -> None:
        """Takes all arrays back: the GPU is done with them."""
        self._used = [0] * len(self._chunks)
        self._staged_bytes = 0

    def close(self) -> None:
        """Frees the chunks. Raises nothing."""
        for chunk in self._chunks:
            cudart().cudaFreeHost(chunk.ctypes.data)
        self._chunks, self._used, self.allocated_bytes = [], [], 0
