"""CUDA graphs: work on a stream that is captured once and launched many times."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from toolchain.cuda.driver import ALLOCATION, call, cudart, describe
from toolchain.cuda.memory import DeviceMemory
from toolchain.errors import EngineError
from toolchain.garbage import gc_paused

Launch = Callable[[], None]


class CudaGraphs:
    """The captured graphs of one memory's stream, by their launches."""

    def __init__(self, memory: DeviceMemory) -> None:
        self._memory = memory
        self._executables: dict[Launch, Any] = {}

    def capture(self, enqueue: Callable[[], None], into: Any = None) -> Any:
        """A graph of what `enqueue` puts on the stream, or `into` with it; nothing of it runs now. Raises EngineError.

        Python's garbage collection is paused meanwhile: what it might free of CUDA's spoils a capture.
        """
        stream = self._memory.handle
        # Other threads may allocate meanwhile: only what this one does can spoil the capture.
        mode = cudart().cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        if into is None:
            call("cudaStreamBeginCapture", stream, mode)
        else:
            call("cudaStreamBeginCaptureToGraph", stream, into, None, None, 0, mode)
        self._memory.recording = True
        try:
            with gc_paused():
                enqueue()
        except BaseException:
            code, graph = _end_capture(self._memory)
            if not code and into is None:
                cudart().cudaGraphDestroy(graph)
            raise
        code, graph = _end_capture(self._memory)
        if code:
            raise EngineError("a capture failed", where="cudaStreamEndCapture", got=describe(code))
        return graph

    def instantiate(self, graph: Any) -> Launch:
        """The launch of a graph, which is used up. Raises EngineError."""
        with ALLOCATION:  # a graph that can be launched has memory of its own on the GPU
            try:
                executable = call("cudaGraphInstantiate", graph, 0)
            finally:
                call("cudaGraphDestroy", graph)
            try:
                call("cudaGraphUpload", executable, self._memory.handle)
            except EngineError:
                cudart().cudaGraphExecDestroy(executable)
                raise
        self._memory.counters.captures += 1
        launch = partial(self._launch, executable)
        self._executables[launch] = executable
        return launch

    def _launch(self, executable: Any) -> None:
        call("cudaGraphLaunch", executable, self._memory.handle)
        self._memory.counters.launches += 1

    def destroy(self, *launches: Launch) -> None:
        """Destroys the graphs behind launches, once the GPU is done with them. Raises nothing."""
        with ALLOCATION:
            for launch in launches:
                executable = self._executables.pop(launch, None)
                if executable is not None:
                    cudart().cudaGraphExecDestroy(executable)

    def close(self) -> None:
        """Destroys all graphs, once the GPU is done with them. Raises nothing."""
        self.destroy(*self._executables)


def abandon_capture(memory: DeviceMemory) -> None:
    """Ends a capture that a library began on the memory's stream and left there when it failed."""
    code, graph = _end_capture(memory)
    if not code:
        cudart().cudaGraphDestroy(graph)


def _end_capture(memory: DeviceMemory) -> Any:
    memory.recording = False
    code, graph = cudart().cudaStreamEndCapture(memory.handle)
    cudart().cudaGetLastError()
    return code, graph
