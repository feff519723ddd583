"""A GPU's memory behind one stream: buffers, copies through pinned memory, events and a shared scratch block."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from toolchain.cuda.capacity import FEWER_BUCKETS
from toolchain.cuda.driver import ALLOCATION, call, cudart, describe
from toolchain.cuda.staging import PinnedStaging
from toolchain.errors import EngineError

log = logging.getLogger("toolchain")


@dataclass(frozen=True)
class DeviceBuffer:
    """A dense tensor on the GPU; it lives until it is freed, at the latest with its memory."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: int | slice, /) -> DeviceBuffer:
        count, *rest = self.shape
        row_bytes = prod(rest) * self.dtype.itemsize
        if isinstance(rows, slice):
            first, stop, stride = rows.indices(count)
            assert stride == 1, "rows of a view are contiguous"
            return replace(self, address=self.address + first * row_bytes, shape=(max(stop - first, 0), *rest))
        if not -count <= rows < count:
            raise IndexError(f"row {rows} of {count}")
        return replace(self, address=self.address + rows % count * row_bytes, shape=tuple(rest))


class Mark:
    """A CUDA event that was recorded on the stream. It returns to the pool when the mark is collected."""

    def __init__(self, pool: list[Any]) -> None:
        """Takes an event from a pool that is not empty."""
        self._pool = pool
        self.event = pool.pop()

    def __del__(self) -> None:
        self._pool.append(self.event)


@dataclass
class Counters:
    """What happened so far and what is allocated: for the bench, and for tests that nothing grows.

    captures, launches  of CUDA graphs
    """

    captures: int = 0
    launches: int = 0
    synchronisations: int = 0
    device_bytes: int = 0
    pinned_bytes: int = 0


class DeviceMemory:
    """`Memory` on the GPU: all work goes to one stream of its own, in order. Raises EngineError, here and everywhere.

    handle     the stream as CUDA's binding knows it; None after `close`
    recording  whether work on the stream is being captured, in which nothing may be written from the host
    """

    def __init__(self) -> None:
        """Creates the stream. Raises EngineError without a GPU."""
        self.counters = Counters()
        self.recording = False
        self._staging = PinnedStaging()
        self._blocks: dict[int, int] = {}  # address -> bytes
        self._scratch: DeviceBuffer | None = None
        self._reserved = 0
        self._warned: set[str] = set()
        self._events: list[Any] = []
        self._free_events: list[Any] = []
        call("cudaSetDevice", 0)
        self.handle: Any = call("cudaStreamCreateWithFlags", cudart().cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle as a number, for libraries that enqueue on it."""
        return int(self.handle)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self.handle is None

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        """A new buffer of zeros. Raises EngineError where the GPU's memory is too small."""
        buffer = self._allocate(tuple(shape), np.dtype(dtype))
        if buffer.nbytes:
            call("cudaMemsetAsync", buffer.address, 0, buffer.nbytes, self.handle)
        return buffer

    def free(self, *buffers: DeviceBuffer) -> None:
        """Waits for the GPU first: it may be working on them. After `close` there is nothing left to free.

        Raises nothing, like all that frees: after an error CUDA answers every call with it, and closing must go on.
        """
        if self.closed or not buffers:
            return
        self.drain()
        with ALLOCATION:
            for buffer in buffers:
                self.counters.device_bytes -= self._blocks.pop(buffer.address)
                cudart().cudaFree(buffer.address)

    def write(self, target: DeviceBuffer, value: ArrayLike) -> None:
        """Copies `value`, broadcast and cast to the buffer, into pinned memory, and enqueues the copy from there."""
        assert not self.recording, "a graph would copy from pinned memory that is given out again"
        if self._staging.is_full(target.nbytes):
            self.synchronize()
        staged = self._stage(target)
        staged[...] = value
        self._copy(target.address, staged.ctypes.data, target.nbytes, "cudaMemcpyHostToDevice")

    def copy(self, target: DeviceBuffer, source: DeviceBuffer) -> None:
        """Enqueues a copy between buffers of one shape and dtype."""
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        self._copy(target.address, source.address, target.nbytes, "cudaMemcpyDeviceToDevice")

    def read(self, *sources: DeviceBuffer) -> list[NDArray[Any]]:
        """Copies of buffers on the host, after everything that was enqueued before. One synchronisation for all."""
        staged = [self._stage(source) for source in sources]
        for source, array in zip(sources, staged, strict=True):
            self._copy(array.ctypes.data, source.address, source.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()
        return [array.copy() for array in staged]

    def _stage(self, buffer: DeviceBuffer) -> NDArray[Any]:
        array = self._staging.take(buffer.shape, buffer.dtype)
        self.counters.pinned_bytes = self._staging.allocated_bytes
        return array

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        if nbytes:
            call("cudaMemcpyAsync", target, source, nbytes, getattr(cudart().cudaMemcpyKind, kind), self.handle)

    def synchronize(self) -> None:
        """Waits for the GPU. Errors of what ran since the last time come up here."""
        call("cudaStreamSynchronize", self.handle)
        self.counters.synchronisations += 1
        self._staging.reset()

    def drain(self) -> None:
        """Waits for the GPU, so that what its work uses can be freed. Raises nothing; nothing after `close`."""
        if not self.closed:
            cudart().cudaStreamSynchronize(self.handle)

    def mark(self) -> Mark:
        """Records an event on the stream."""
        if not self._free_events:
            self._events.append(call("cudaEventCreateWithFlags", cudart().cudaEventDefault))
            self._free_events.append(self._events[-1])
        mark = Mark(self._free_events)
        call("cudaEventRecord", mark.event, self.handle)
        return mark

    def elapsed_ms(self, first: Mark, second: Mark) -> float:
        """Milliseconds of the GPU between two events that it has passed."""
        return float(call("cudaEventElapsedTime", first.event, second.event))

    def loop(self, first: Callable[[], None], second: Callable[[], None]) -> Callable[[int], None] | None:
        """None: launches here are not captured by this memory."""
        return None

    def reserve(self, nbytes: int) -> None:
        """Announces a size of `scratch`, so that its block is made large enough at once."""
        self._reserved = max(self._reserved, nbytes)

    def scratch(self, nbytes: int) -> DeviceBuffer:
        """At least `nbytes` that all engines share: what one leaves there, the next overwrites.

        Captured graphs hold the address, so a block that proves too small stays, and a larger one is allocated.
        """
        if self._scratch is None or self._scratch.nbytes < nbytes:
            self.reserve(nbytes)
            self._scratch = self._allocate((max(self._reserved, 1),), np.dtype(np.uint8))
        return self._scratch

    def _allocate(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> DeviceBuffer:
        nbytes = max(prod(shape) * dtype.itemsize, 1)
        call("cudaSetDevice", 0)  # of this thread, which may be another than the one that opened the memory
        with ALLOCATION:
            code, address = cudart().cudaMalloc(nbytes)
        if code == cudart().cudaError_t.cudaErrorMemoryAllocation:
            cudart().cudaGetLastError()  # it would come up again in whatever call is next
            free, total = call("cudaMemGetInfo")
            raise EngineError(
                "the GPU's memory is too small",
                expected=f"{_mib(nbytes)} free",
                got=f"{_mib(free)} free of {_mib(total)}, {_mib(self.counters.device_bytes)} used by buffers here",
                hint=f"{FEWER_BUCKETS}, or put smaller ones into the recipe",
            )
        if code:
            raise EngineError("a CUDA call failed", where="cudaMalloc", got=describe(code))
        self._blocks[int(address)] = nbytes
        self.counters.device_bytes += nbytes
        return DeviceBuffer(int(address), shape, dtype)

    def warn(self, message: str) -> None:
        """Logs a warning once: what one binding cannot do, others cannot do either."""
        if message not in self._warned:
            log.warning(message)
        self._warned.add(message)

    def close(self) -> None:
        """Waits for the GPU and frees everything. Engines must be closed before it."""
        if self.closed:
            return
        runtime = cudart()
        self.drain()  # what any of these calls says no longer matters
        for event in self._events:
            runtime.cudaEventDestroy(event)
        with ALLOCATION:
            for address in self._blocks:
                runtime.cudaFree(address)
            self._staging.close()
        runtime.cudaStreamDestroy(self.handle)
        self._events, self._blocks, self.handle, self._scratch = [], {}, None, None
        self.counters.device_bytes = self.counters.pinned_bytes = 0


def _mib(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB"
