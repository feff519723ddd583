"""The memory of a pipeline whose launches are captured CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable

from toolchain.cuda.driver import ALLOCATION, call
from toolchain.cuda.graphs import CudaGraphs, Launch
from toolchain.cuda.loop import StepLoop
from toolchain.cuda.memory import DeviceMemory
from toolchain.errors import EngineError

CUDA_GRAPHS = ("step", "loop", "off")


class CapturingMemory(DeviceMemory):
    """A `DeviceMemory` that captures what engines enqueue.

    cuda_graph  "step" captures each binding, "loop" also whole runs of steps, "off" launches kernel by kernel

    A capture that fails is logged, and its binding is launched kernel by kernel.
    """

    def __init__(self, cuda_graph: str = "step") -> None:
        """Creates the stream. Raises EngineError without a GPU."""
        assert cuda_graph in CUDA_GRAPHS
        super().__init__()
        self.cuda_graph = cuda_graph
        self.graphs = CudaGraphs(self)
        self._enqueues: dict[Launch, Callable[[], None]] = {}  # what was captured, by its launch
        self._loops: dict[Launch, StepLoop] = {}  # by their first launch

    def capture(self, enqueue: Callable[[], None], capturable: Callable[[], bool] = lambda: True) -> Launch:
        """A launch of everything that `enqueue` puts on the stream, which must be the same work each time.

        Runs it once before: engines set themselves up and allocate in their first run, which no capture allows.
        `capturable` is then asked whether the work can be captured at all. Raises what `enqueue` raises.
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
            launch = self.graphs.instantiate(self.graphs.capture(enqueue))
        except EngineError as error:
            self.warn(f"work that cannot be captured in a CUDA graph is launched without: {error.where}: {error.got}")
            return enqueue
        self._enqueues[launch] = enqueue
        return launch

    def loop(self, first: Launch, second: Launch) -> Callable[[int], None] | None:
        """What launches a number of steps, `first` and `second` by turns, as one graph. Both come from `capture`.

        None unless whole runs are to be captured, and the single steps could be.
        """
        if self.cuda_graph != "loop" or not {first, second} <= self._enqueues.keys():
            return None
        enqueues = (self._enqueues[first], self._enqueues[second])
        self._loops[first] = StepLoop(self, self.graphs, (first, second), enqueues)
        return self._loops[first]

    def release(self, *launches: Launch) -> None:
        """Waits for the GPU, so that what the launches use can be freed, and destroys their graphs and loops.

        Raises nothing.
        """
        if self.closed:
            return
        self.drain()
        for launch in launches:
            if launch in self._loops:
                self._loops.pop(launch).close()
            self._enqueues.pop(launch, None)
        self.graphs.destroy(*launches)

    def close(self) -> None:
        """Waits for the GPU and frees everything. Engines must be closed before it."""
        if self.closed:
            return
        for loop in self._loops.values():
            loop.close()
        self._loops = {}
        self.drain()
        self.graphs.close()
        super().close()
