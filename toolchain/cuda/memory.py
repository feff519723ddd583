"""A GPU's memory behind one stream: buffers, pinned staging, events and captured graphs."""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from toolchain.cuda.capacity import FEWER_BUCKETS
from toolchain.cuda.driver import ALLOCATION, call, cudart, describe
from toolchain.errors import EngineError
from toolchain.garbage import kept_garbage

if TYPE_CHECKING:
    from toolchain.cuda.loop import StepLoop

log = logging.getLogger("toolchain")

ALIGNMENT = 256
"""Bytes: what TensorRT asks of addresses, and what cudaMalloc gives."""
CHUNK_BYTES = 4 << 20
STAGED_BYTES = 256 << 20
"""What may wait in pinned memory; a write beyond it waits for the GPU first."""
CUDA_GRAPHS = ("step", "loop", "off")


@dataclass(frozen=True)
class DeviceBuffer:
    """A dense tensor on the GPU; it lives until it is freed, at the latest with its memory."""

    address: int
    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, rows: int | slice, /) -> DeviceBuffer:
        count, *rest = self.shape
        row_bytes = prod(rest) * self.dtype.itemsize
        if isinstance(rows, slice):
            first, stop, stride = rows.indices(count)
            assert stride == 1, "rows of a view lie side by side"
            return replace(self, address=self.address + first * row_bytes, shape=(max(stop - first, 0), *rest))
        if not -count <= rows < count:
            raise IndexError(f"row {rows} of {count}")
        return replace(self, address=self.address + rows % count * row_bytes, shape=tuple(rest))


class Mark:
    """A moment on the stream. Its event goes back to the pool with it."""

    def __init__(self, pool: list[Any]) -> None:
        self._pool = pool
        self.event = pool.pop()

    def __del__(self) -> None:
        self._pool.append(self.event)


@dataclass
class Counters:
    """What happened so far, and what is held: for the bench, and for tests that nothing grows.

    launches  of captured graphs
    """

    captures: int = 0
    launches: int = 0
    synchronisations: int = 0
    device_bytes: int = 0
    pinned_bytes: int = 0


class _Staging:
    """Pinned host memory, handed out piece by piece and taken back all at once, when the GPU is done with it."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._chunks: list[NDArray[np.uint8]] = []
        self._used: list[int] = []
        self.waiting = 0

    def take(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
        """An array that the GPU can copy from and to. What it holds is whatever was there."""
        nbytes = prod(shape) * dtype.itemsize
        room = -(-nbytes // ALIGNMENT) * ALIGNMENT
        fits = (i for i, chunk in enumerate(self._chunks) if self._used[i] + room <= chunk.nbytes)
        index = next(fits, None)
        if index is None:
            index = self._grow(max(room, CHUNK_BYTES))
        start = self._used[index]
        self._used[index] += room
        self.waiting += room
        return self._chunks[index][start : start + nbytes].view(dtype).reshape(shape)

    def _grow(self, nbytes: int) -> int:
        with ALLOCATION:
            address = call("cudaHostAlloc", nbytes, cudart().cudaHostAllocDefault)
        self._counters.pinned_bytes += nbytes
        self._chunks.append(np.ctypeslib.as_array((ctypes.c_ubyte * nbytes).from_address(address)))
        self._used.append(0)
        return len(self._chunks) - 1

    def reset(self) -> None:
        self._used = [0] * len(self._chunks)
        self.waiting = 0

    def close(self) -> None:
        for chunk in self._chunks:
            cudart().cudaFreeHost(chunk.ctypes.data)
            self._counters.pinned_bytes -= chunk.nbytes
        self._chunks, self._used = [], []


class DeviceMemory:
    """`Memory` on the GPU: all work goes to one stream of its own, in order.

    cuda_graph  "step" captures each binding, "loop" also whole runs of steps, "off" launches kernel by kernel

    A capture that fails is logged, and its binding is launched without. Raises EngineError, here and everywhere.
    """

    def __init__(self, cuda_graph: str = "step") -> None:
        assert cuda_graph in CUDA_GRAPHS
        self.cuda_graph = cuda_graph
        self.counters = Counters()
        self._staging = _Staging(self.counters)
        self._blocks: dict[int, int] = {}  # address -> bytes
        self._scratch: DeviceBuffer | None = None
        self._reserved = 0
        self._recording = False
        self._warned: set[str] = set()
        self._graphs: dict[Callable[[], None], Any] = {}  # what is behind each launch
        self._enqueues: dict[Callable[[], None], Callable[[], None]] = {}
        self._loops: dict[Callable[[], None], StepLoop] = {}  # by their first launch
        self._events: list[Any] = []
        self._marks: list[Any] = []  # events that no mark holds now
        call("cudaSetDevice", 0)
        self._stream: Any = call("cudaStreamCreateWithFlags", cudart().cudaStreamNonBlocking)

    @property
    def stream(self) -> int:
        """The stream's handle, for libraries that enqueue on it."""
        return int(self._stream)

    @property
    def closed(self) -> bool:
        return self._stream is None

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> DeviceBuffer:
        buffer = self._allocate(tuple(shape), np.dtype(dtype))
        if buffer.nbytes:
            call("cudaMemsetAsync", buffer.address, 0, buffer.nbytes, self._stream)
        return buffer

    def free(self, *buffers: DeviceBuffer) -> None:
        """Waits for the GPU first: it may be working on them. After `close` there is nothing left to free.

        Raises nothing, like all that frees: after an error CUDA answers every call with it, and closing must go on.
        """
        if self.closed or not buffers:
            return
        cudart().cudaStreamSynchronize(self._stream)
        with ALLOCATION:
            for buffer in buffers:
                self.counters.device_bytes -= self._blocks.pop(buffer.address)
                cudart().cudaFree(buffer.address)

    def write(self, target: DeviceBuffer, value: ArrayLike) -> None:
        """Copies `value`, broadcast and cast to the buffer, into pinned memory, and from there when its turn comes."""
        assert not self._recording, "a graph would copy from pinned memory that is given out again"
        if self._staging.waiting + target.nbytes > STAGED_BYTES:
            self.synchronize()
        staged = self._staging.take(target.shape, target.dtype)
        staged[...] = value
        self._copy(target.address, staged.ctypes.data, target.nbytes, "cudaMemcpyHostToDevice")

    def copy(self, target: DeviceBuffer, source: DeviceBuffer) -> None:
        assert (target.shape, target.dtype) == (source.shape, source.dtype)
        self._copy(target.address, source.address, target.nbytes, "cudaMemcpyDeviceToDevice")

    def read(self, *sources: DeviceBuffer) -> list[NDArray[Any]]:
        staged = [self._staging.take(source.shape, source.dtype) for source in sources]
        for source, there in zip(sources, staged, strict=True):
            self._copy(there.ctypes.data, source.address, source.nbytes, "cudaMemcpyDeviceToHost")
        self.synchronize()
        return [there.copy() for there in staged]

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        if nbytes:
            call("cudaMemcpyAsync", target, source, nbytes, getattr(cudart().cudaMemcpyKind, kind), self._stream)

    def synchronize(self) -> None:
        """Waits for the GPU. Errors of what ran since the last time come up here."""
        call("cudaStreamSynchronize", self._stream)
        self.counters.synchronisations += 1
        self._staging.reset()

    def mark(self) -> Mark:
        if not self._marks:
            self._events.append(call("cudaEventCreateWithFlags", cudart().cudaEventDefault))
            self._marks.append(self._events[-1])
        mark = Mark(self._marks)
        call("cudaEventRecord", mark.event, self._stream)
        return mark

    def elapsed_ms(self, first: Mark, second: Mark) -> float:
        return float(call("cudaEventElapsedTime", first.event, second.event))

    def reserve(self, nbytes: int) -> None:
        """Says what `scratch` will be asked for, so that its block is made large enough at once."""
        self._reserved = max(self._reserved, nbytes)

    def scratch(self, nbytes: int) -> DeviceBuffer:
        """At least `nbytes` that all engines share: what one leaves there, the next overwrites.

        Captured graphs hold the address, so a block that proves too small stays and a larger one is put beside it.
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

    def capture(self, enqueue: Callable[[], None], capturable: Callable[[], bool] = lambda: True) -> Callable[[], None]:
        """A launch of everything that `enqueue` puts on the stream, which it must put there in the same way each time.

        Runs it once before: engines set themselves up and allocate in their first run, which no capture allows.
        `capturable` is asked then whether it can be captured at all.
        """
        call("cudaSetDevice", 0)
        with ALLOCATION:
            enqueue()
        self.synchronize()
        if self.cuda_graph == "off":
            return enqueue
        if not capturable():
            self.warn("work is launched without a CUDA graph: the engine's library says that it cannot be captured")
            return enqueue
        try:
            launch = self.instantiate(self.record(enqueue))
        except EngineError as error:
            self.warn(f"work that cannot be captured in a CUDA graph is launched without: {error.where}: {error.got}")
            return enqueue
        self._enqueues[launch] = enqueue
        return launch

    def loop(self, first: Callable[[], None], second: Callable[[], None]) -> Callable[[int], None] | None:
        """Both come from `capture`. None unless runs are to be captured whole, and single steps could be."""
        if self.cuda_graph != "loop" or not {first, second} <= self._enqueues.keys():
            return None
        from toolchain.cuda.loop import StepLoop

        made = StepLoop(self, (first, second), (self._enqueues[first], self._enqueues[second]))
        self._loops[first] = made
        return made

    def record(self, enqueue: Callable[[], None], into: Any = None) -> Any:
        """A graph of what `enqueue` puts on the stream, or `into` with it; nothing of it runs now.

        Python collects no garbage meanwhile: what it might free of CUDA's spoils a capture.
        """
        # Other threads may allocate meanwhile: only what this one does can spoil the capture.
        mode = cudart().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        if into is None:
            call("cudaStreamBeginCapture", self._stream, mode)
        else:
            call("cudaStreamBeginCaptureToGraph", self._stream, into, None, None, 0, mode)
        self._recording = True
        try:
            with kept_garbage():
                enqueue()
        except BaseException:
            code, graph = self._end_capture()
            if not code and into is None:
                cudart().cudaGraphDestroy(graph)
            raise
        code, graph = self._end_capture()
        if code:
            raise EngineError("a capture failed", where="cudaStreamEndCapture", got=describe(code))
        return graph

    def _end_capture(self) -> Any:
        self._recording = False
        code, graph = cudart().cudaStreamEndCapture(self._stream)
        cudart().cudaGetLastError()
        return code, graph

    def abandon_capture(self) -> None:
        """Ends a capture that a library began on the stream and left there when it failed."""
        code, graph = self._end_capture()
        if not code:
            cudart().cudaGraphDestroy(graph)

    def instantiate(self, graph: Any) -> Callable[[], None]:
        """The launch of a graph, which is used up."""
        with ALLOCATION:  # a graph that can be launched has memory of its own on the GPU
            try:
                executable = call("cudaGraphInstantiate", graph, 0)
            finally:
                call("cudaGraphDestroy", graph)
            try:
                call("cudaGraphUpload", executable, self._stream)
            except EngineError:
                cudart().cudaGraphExecDestroy(executable)
                raise
        self.counters.captures += 1
        launch = partial(self._launch, executable)
        self._graphs[launch] = executable
        return launch

    def _launch(self, executable: Any) -> None:
        call("cudaGraphLaunch", executable, self._stream)
        self.counters.launches += 1

    def warn(self, message: str) -> None:
        """Once for each reason: what one binding cannot, others cannot either."""
        if message not in self._warned:
            log.warning(message)
        self._warned.add(message)

    def release(self, *launches: Callable[[], None]) -> None:
        """Waits for the GPU, so that what the launches use may go, and destroys the graphs and loops behind them."""
        if self.closed:
            return
        cudart().cudaStreamSynchronize(self._stream)  # errors are the reader's business
        for launch in launches:
            if launch in self._loops:
                self._loops.pop(launch).close()
            self._enqueues.pop(launch, None)
            executable = self._graphs.pop(launch, None)
            if executable is not None:
                with ALLOCATION:
                    cudart().cudaGraphExecDestroy(executable)

    def close(self) -> None:
        """Waits for the GPU and frees everything. Engines must be closed before it."""
        if self.closed:
            return
        for loop in self._loops.values():
            loop.close()
        runtime = cudart()
        runtime.cudaStreamSynchronize(self._stream)  # what any of these calls says no longer matters
        for event in self._events:
            runtime.cudaEventDestroy(event)
        with ALLOCATION:
            for executable in self._graphs.values():
                runtime.cudaGraphExecDestroy(executable)
            for address in self._blocks:
                runtime.cudaFree(address)
            self._staging.close()
        runtime.cudaStreamDestroy(self._stream)
        self._graphs, self._events, self._blocks, self._stream, self._scratch = {}, [], {}, None, None
        self.counters.device_bytes = 0


def by_turns(first: Callable[[], None], second: Callable[[], None], steps: int) -> None:
    """Launches so many steps one by one."""
    for index in range(steps):
        (second if index % 2 else first)()


def _mib(nbytes: int) -> str:
    return f"{nbytes >> 20} MiB"
