# ruff: noqa: N801, N802, N803, N815, N816
"""The functions of `cuda.bindings.runtime` that this project calls, over a pretended GPU.

Same names, same (error, value...) tuples. Streams are lazy: nothing enqueued runs before a synchronisation, so that a
host that reads too early, or reuses a staging buffer too early, sees wrong bytes. Names with an underscore are for
tests and for the fake TensorRT. Environment:

FAKE_CUDA_GPU, FAKE_CUDA_CC, FAKE_CUDA_SMS, FAKE_CUDA_MEMORY_MB   the device
FAKE_CUDA_FAIL   a list of no_device, no_driver, old_driver, out_of_memory, capture, instantiate, conditional, no_nvrtc
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

from . import _machine as machine
from ._machine import VIOLATIONS as _VIOLATIONS
from ._machine import Violation as _Violation  # noqa: F401  (tests expect it here)

cudaStreamNonBlocking = 1
cudaEventDefault = 0
cudaHostAllocDefault = 0
_DRIVER = 13000


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35
    cudaErrorNoDevice = 100
    cudaErrorInvalidResourceHandle = 400
    cudaErrorNotSupported = 801
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1
    cudaStreamCaptureModeRelaxed = 2


class cudaStreamCaptureStatus(IntEnum):
    cudaStreamCaptureStatusNone = 0
    cudaStreamCaptureStatusActive = 1
    cudaStreamCaptureStatusInvalidated = 2


class cudaGraphNodeType(IntEnum):
    cudaGraphNodeTypeKernel = 0
    cudaGraphNodeTypeConditional = 13


class cudaGraphConditionalNodeType(IntEnum):
    cudaGraphCondTypeIf = 0
    cudaGraphCondTypeWhile = 1


class _Handle(int):
    """The bindings' handle types: made from an int, turned back by int()."""

    def __new__(cls, init_value: int = 0) -> _Handle:
        return super().__new__(cls, init_value)


class cudaStream_t(_Handle):
    pass


class cudaEvent_t(_Handle):
    pass


class cudaGraph_t(_Handle):
    pass


class cudaGraphExec_t(_Handle):
    pass


class cudaGraphNode_t(_Handle):
    pass


class cudaGraphConditionalHandle(_Handle):
    pass


@dataclass
class cudaUUID_t:
    bytes: bytes = b"\x5a" * 16


@dataclass
class cudaDeviceProp:
    name: bytes = b""
    major: int = 0
    minor: int = 0
    multiProcessorCount: int = 0
    totalGlobalMem: int = 0
    uuid: cudaUUID_t = field(default_factory=cudaUUID_t)


@dataclass
class _Conditional:
    handle: int = 0
    type: int = 0
    size: int = 0
    phGraph_out: list[cudaGraph_t] = field(default_factory=list)


@dataclass
class cudaGraphNodeParams:
    type: int = 0
    conditional: _Conditional = field(default_factory=_Conditional)


_OK = cudaError_t.cudaSuccess


def _driver() -> int:
    return 0 if machine.failing("no_driver") else 12020 if machine.failing("old_driver") else _DRIVER


def _refused() -> cudaError_t | None:
    """What every call returns on a machine that has no usable GPU."""
    if _driver() < _DRIVER:
        return cudaError_t.cudaErrorInsufficientDriver
    return cudaError_t.cudaErrorNoDevice if machine.failing("no_device") else None


def _forbidden_now(what: str) -> cudaError_t | None:
    """Spoils a capture in progress, as calls do that wait for the device or allocate."""
    for stream in machine.capturing():
        stream.invalid = True
        _VIOLATIONS.append(f"{what} during a capture")
        return cudaError_t.cudaErrorStreamCaptureUnsupported
    return None


def cudaGetErrorName(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return _OK, error.name.encode()


def cudaGetErrorString(error: cudaError_t) -> tuple[cudaError_t, bytes]:
    return _OK, f"the fake's text for {int(error)}".encode()


def cudaGetLastError() -> tuple[cudaError_t]:
    return (_OK,)


def cudaDriverGetVersion() -> tuple[cudaError_t, int]:
    return _OK, _driver()


def cudaRuntimeGetVersion() -> tuple[cudaError_t, int]:
    return _OK, 13000


def cudaGetDeviceCount() -> tuple[cudaError_t, int | None]:
    error = _refused()
    return (error, None) if error else (_OK, 1)


def cudaSetDevice(device: int) -> tuple[cudaError_t]:
    return (_refused() or _OK,)


def cudaGetDeviceProperties(device: int) -> tuple[cudaError_t, cudaDeviceProp | None]:
    error = _refused()
    if error:
        return error, None
    major, minor = os.environ.get("FAKE_CUDA_CC", "9.0").split(".")
    name = os.environ.get("FAKE_CUDA_GPU", "NVIDIA H200").encode()
    return _OK, cudaDeviceProp(name, int(major), int(minor), int(os.environ.get("FAKE_CUDA_SMS", "132")), _total())


def _total() -> int:
    return int(os.environ.get("FAKE_CUDA_MEMORY_MB", "143771")) << 20


def cudaMemGetInfo() -> tuple[cudaError_t, int | None, int | None]:
    error = _refused()
    return (error, None, None) if error else (_OK, _total() - machine.HEAP.used("device"), _total())


def cudaMalloc(size: int) -> tuple[cudaError_t, int | None]:
    error = _refused() or _forbidden_now("cudaMalloc")
    if error:
        return error, None
    if machine.failing("out_of_memory") or size > _total() - machine.HEAP.used("device"):
        return cudaError_t.cudaErrorMemoryAllocation, None
    return _OK, machine.HEAP.allocate(size, "device")


def cudaHostAlloc(size: int, flags: int) -> tuple[cudaError_t, int | None]:
    error = _refused() or _forbidden_now("cudaHostAlloc")
    return (error, None) if error else (_OK, machine.HEAP.allocate(size, "pinned"))


def _free(what: str, address: int, kind: str) -> tuple[cudaError_t]:
    error = _forbidden_now(what)
    if error:
        return (error,)
    if address and not machine.HEAP.free(int(address), kind):
        raise machine.violation(f"{what}: {int(address):#x} is no live {kind} block")
    return (_OK,)


def cudaFree(devPtr: int) -> tuple[cudaError_t]:
    return _free("cudaFree", devPtr, "device")


def cudaFreeHost(ptr: int) -> tuple[cudaError_t]:
    return _free("cudaFreeHost", ptr, "pinned")


def cudaMemcpyAsync(
    dst: int, src: int, count: int, kind: cudaMemcpyKind, stream: cudaStream_t | int
) -> tuple[cudaError_t]:
    found = _stream(stream)
    if found is None:
        return (cudaError_t.cudaErrorInvalidResourceHandle,)
    ends = {1: ("device", "pinned"), 2: ("pinned", "device"), 3: ("device", "device")}[int(kind)]

    def ranges() -> list[Any]:
        return [machine.view(a, count, "cudaMemcpyAsync", k) for a, k in zip((dst, src), ends, strict=True)]

    def run() -> None:
        target, source = ranges()
        target[:] = source

    ranges()  # both ends must live when asked for, and again when it happens
    machine.enqueue(found, run, f"copy {count} bytes {src:#x} -> {dst:#x}")
    return (_OK,)


def cudaMemsetAsync(devPtr: int, value: int, count: int, stream: cudaStream_t | int) -> tuple[cudaError_t]:
    found = _stream(stream)
    if found is None:
        return (cudaError_t.cudaErrorInvalidResourceHandle,)

    def run() -> None:
        machine.view(devPtr, count, "cudaMemsetAsync")[:] = value

    machine.view(devPtr, count, "cudaMemsetAsync")
    machine.enqueue(found, run, f"set {count} bytes at {devPtr:#x}")
    return (_OK,)


def _stream(handle: int) -> machine.Stream | None:
    return machine.STREAMS.get(int(handle))


def cudaStreamCreateWithFlags(flags: int) -> tuple[cudaError_t, cudaStream_t | None]:
    error = _refused()
    if error:
        return error, None
    handle = next(machine.HANDLES)
    machine.STREAMS[handle] = machine.Stream(handle)
    return _OK, cudaStream_t(handle)


def cudaStreamDestroy(stream: cudaStream_t | int) -> tuple[cudaError_t]:
    found = machine.STREAMS.pop(int(stream), None)
    if found is None:
        raise machine.violation("cudaStreamDestroy: no such stream")
    found.drain()
    return (_OK,)


def cudaStreamSynchronize(stream: cudaStream_t | int) -> tuple[cudaError_t]:
    error = _forbidden_now("cudaStreamSynchronize")
    found = _stream(stream)
    if error or found is None:
        return (error or cudaError_t.cudaErrorInvalidResourceHandle,)
    found.drain()
    return (_OK,)


def cudaStreamIsCapturing(stream: cudaStream_t | int) -> tuple[cudaError_t, cudaStreamCaptureStatus | None]:
    found = _stream(stream)
    if found is None:
        return cudaError_t.cudaErrorInvalidResourceHandle, None
    return _OK, cudaStreamCaptureStatus(0 if found.capture is None else 2 if found.invalid else 1)


def cudaStreamBeginCapture(stream: cudaStream_t | int, mode: cudaStreamCaptureMode) -> tuple[cudaError_t]:
    return _begin(stream, machine.Graph(next(machine.HANDLES)))


def cudaStreamBeginCaptureToGraph(
    stream: cudaStream_t | int,
    graph: cudaGraph_t | int,
    dependencies: Any,
    dependencyData: Any,
    numDependencies: int,
    mode: cudaStreamCaptureMode,
) -> tuple[cudaError_t]:
    return _begin(stream, machine.GRAPHS[int(graph)])


def _begin(stream: cudaStream_t | int, graph: machine.Graph) -> tuple[cudaError_t]:
    found = _stream(stream)
    if found is None or found.capture is not None:
        return (cudaError_t.cudaErrorInvalidValue,)
    found.capture, found.invalid = graph, False
    return (_OK,)


def cudaStreamEndCapture(stream: cudaStream_t | int) -> tuple[cudaError_t, cudaGraph_t | None]:
    found = _stream(stream)
    if found is None or found.capture is None:
        return cudaError_t.cudaErrorInvalidValue, None
    graph, found.capture = found.capture, None
    if found.invalid or machine.failing("capture"):
        return cudaError_t.cudaErrorStreamCaptureInvalidated, None
    machine.GRAPHS[graph.handle] = graph
    return _OK, cudaGraph_t(graph.handle)


def cudaGraphCreate(flags: int) -> tuple[cudaError_t, cudaGraph_t | None]:
    graph = machine.Graph(next(machine.HANDLES))
    machine.GRAPHS[graph.handle] = graph
    return _OK, cudaGraph_t(graph.handle)


def cudaGraphInstantiate(graph: cudaGraph_t | int, flags: int) -> tuple[cudaError_t, cudaGraphExec_t | None]:
    error = _forbidden_now("cudaGraphInstantiate")
    if error or machine.failing("instantiate"):
        return error or cudaError_t.cudaErrorInvalidValue, None
    made = machine.Executable(next(machine.HANDLES), tuple(machine.GRAPHS[int(graph)].work))
    machine.EXECUTABLES[made.handle] = made
    return _OK, cudaGraphExec_t(made.handle)


def cudaGraphUpload(graphExec: cudaGraphExec_t | int, stream: cudaStream_t | int) -> tuple[cudaError_t]:
    return (_OK if int(graphExec) in machine.EXECUTABLES else cudaError_t.cudaErrorInvalidValue,)


def cudaGraphLaunch(graphExec: cudaGraphExec_t | int, stream: cudaStream_t | int) -> tuple[cudaError_t]:
    found, made = _stream(stream), machine.EXECUTABLES.get(int(graphExec))
    if found is None or made is None:
        raise machine.violation("cudaGraphLaunch: no such stream or graph")
    if found.capture is not None:
        found.invalid = True
        return (cudaError_t.cudaErrorStreamCaptureUnsupported,)

    def run() -> None:
        if made.handle not in machine.EXECUTABLES:
            raise machine.violation("a graph was destroyed before its launch ran")
        for work in made.work:
            work.run()

    machine.enqueue(found, run, f"graph of {len(made.work)}")
    return (_OK,)


def cudaGraphDestroy(graph: cudaGraph_t | int) -> tuple[cudaError_t]:
    if machine.GRAPHS.pop(int(graph), None) is None:
        raise machine.violation("cudaGraphDestroy: no such graph")
    return (_OK,)


def cudaGraphExecDestroy(graphExec: cudaGraphExec_t | int) -> tuple[cudaError_t]:
    if machine.EXECUTABLES.pop(int(graphExec), None) is None:
        raise machine.violation("cudaGraphExecDestroy: no such graph")
    return (_OK,)


def cudaGraphConditionalHandleCreate(
    graph: cudaGraph_t | int, defaultLaunchValue: int, flags: int
) -> tuple[cudaError_t, cudaGraphConditionalHandle | None]:
    if machine.failing("conditional"):
        return cudaError_t.cudaErrorNotSupported, None
    handle = next(machine.HANDLES)
    machine.CONDITIONS[handle] = [defaultLaunchValue, defaultLaunchValue if flags & 1 else 0]
    return _OK, cudaGraphConditionalHandle(handle)


def cudaGraphAddNode(
    graph: cudaGraph_t | int,
    pDependencies: Any,
    dependencyData: Any,
    numDependencies: int,
    nodeParams: cudaGraphNodeParams,
) -> tuple[cudaError_t, cudaGraphNode_t | None]:
    """Conditional nodes of the kind WHILE alone. The node goes behind what the graph holds."""
    wanted = nodeParams.conditional
    if nodeParams.type != cudaGraphNodeType.cudaGraphNodeTypeConditional or wanted.type != 1 or wanted.size != 1:
        return cudaError_t.cudaErrorInvalidValue, None
    body = machine.Graph(next(machine.HANDLES), nested=True)
    machine.GRAPHS[body.handle] = body
    value = machine.CONDITIONS[int(wanted.handle)]

    def run() -> None:
        value[0] = value[1]
        while value[0]:
            for work in body.work:
                work.run()

    machine.GRAPHS[int(graph)].work.append(machine.Work(run, "while"))
    wanted.phGraph_out = [cudaGraph_t(body.handle)]
    return _OK, cudaGraphNode_t(next(machine.HANDLES))


def cudaEventCreateWithFlags(flags: int) -> tuple[cudaError_t, cudaEvent_t | None]:
    error = _refused()
    if error:
        return error, None
    handle = next(machine.HANDLES)
    machine.EVENTS[handle] = machine.Event(handle)
    return _OK, cudaEvent_t(handle)


def cudaEventRecord(event: cudaEvent_t | int, stream: cudaStream_t | int) -> tuple[cudaError_t]:
    found, made = _stream(stream), machine.EVENTS.get(int(event))
    if found is None or made is None:
        return (cudaError_t.cudaErrorInvalidResourceHandle,)
    made.stream, made.time = found, None

    def run() -> None:
        made.time = time.perf_counter()

    machine.enqueue(found, run, "event")
    return (_OK,)


def cudaEventSynchronize(event: cudaEvent_t | int) -> tuple[cudaError_t]:
    error = _forbidden_now("cudaEventSynchronize")
    if error:
        return (error,)
    made = machine.EVENTS[int(event)]
    while made.stream is not None and made.time is None and made.stream.queue:
        made.stream.queue.popleft().run()
    return (_OK,)


def cudaEventElapsedTime(start: cudaEvent_t | int, end: cudaEvent_t | int) -> tuple[cudaError_t, float | None]:
    first, second = machine.EVENTS[int(start)], machine.EVENTS[int(end)]
    if first.time is None or second.time is None:
        raise machine.violation("cudaEventElapsedTime: an event has not happened yet")
    return _OK, (second.time - first.time) * 1e3


def cudaEventDestroy(event: cudaEvent_t | int) -> tuple[cudaError_t]:
    if machine.EVENTS.pop(int(event), None) is None:
        raise machine.violation("cudaEventDestroy: no such event")
    return (_OK,)


def _enqueue(stream_handle: int, fn: Callable[[], None], what: str) -> None:
    """For fake kernels: `fn` runs when the stream gets there, or at each launch of the graph being captured."""
    found = _stream(stream_handle)
    if found is None:
        raise machine.violation(f"{what}: no stream {stream_handle}")
    machine.enqueue(found, fn, what)


def _capturing(stream_handle: int) -> bool:
    found = _stream(stream_handle)
    return found is not None and found.capture is not None


def _view(address: int, nbytes: int, what: str) -> Any:
    """The bytes of device memory at an address, writable; Violation unless they lie in one live block."""
    return machine.view(address, nbytes, what)


def _pending(stream_handle: int) -> list[str]:
    """What is enqueued and has not run."""
    return [work.what for work in machine.STREAMS[int(stream_handle)].queue]


def _live() -> list[str]:
    """What has not been freed or destroyed."""
    return machine.live()
