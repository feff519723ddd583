"""A run of any number of steps as one launch: two steps in the body of a WHILE node, its trip count in GPU memory.

The body ends in a kernel of one thread that counts down and says whether there is another pass. Bodies hold kernels,
copies and nothing of the host (CUDA programming guide, "Conditional graph nodes"; CUDA 12.4 and newer). Where that
cannot be had, each number of passes is a graph of its own with the steps one after the other.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import numpy as np

from toolchain.cuda.driver import ALLOCATION, call, cudart, device_facts
from toolchain.cuda.graphs import CudaGraphs
from toolchain.cuda.memory import DeviceMemory
from toolchain.errors import EngineError

Enqueue = Callable[[], None]
Pair = tuple[Enqueue, Enqueue]
UNROLLED = 4  # numbers of passes whose graphs are kept: each holds every kernel of every step
ASSIGN_DEFAULT = 1  # cudaGraphCondAssignDefault, which the binding lacks
KERNEL = b"next_pass"
SOURCE = b"""
extern "C" __device__ __cudart_builtin__ void CUDARTAPI
cudaGraphSetConditional(cudaGraphConditionalHandle handle, unsigned int value);

extern "C" __global__ void next_pass(cudaGraphConditionalHandle handle, int *left) {
    *left -= 1;
    cudaGraphSetConditional(handle, *left > 0);
}
"""


class StepLoop:
    """Launches steps by turns: first, second, first ... What remains of an odd number is one launch of the first."""

    def __init__(self, memory: DeviceMemory, graphs: CudaGraphs, launches: Pair, enqueues: Pair) -> None:
        """Two launches and what enqueues the same work. What cannot be captured is done otherwise, with a warning."""
        self._memory, self._graphs = memory, graphs
        self._launches = launches
        self._enqueues = enqueues
        self._unrolled: dict[int, Enqueue] = {}
        self._left = memory.zeros((1,), np.int32)
        self._module: Any = None
        self._while: Enqueue | None = None
        try:
            self._while = self._capture_while()
        except EngineError as error:
            memory.warn(f"each number of steps is captured on its own: {error.what}: {error.got}")

    def __call__(self, steps: int) -> None:
        passes, rest = divmod(steps, 2)
        if passes:
            self._launch(passes)
        if rest:
            self._launches[0]()

    def _launch(self, passes: int) -> None:
        if self._while is not None:
            self._memory.write(self._left, passes)
            self._while()
            return
        if passes not in self._unrolled:
            if len(self._unrolled) == UNROLLED:
                self._memory.drain()
                self._graphs.destroy(self._unrolled.pop(next(iter(self._unrolled))))
            self._unrolled[passes] = self._unroll(passes)
        self._unrolled[passes]()

    def close(self) -> None:
        """Frees graphs, trip count and kernel, once the GPU is done with them."""
        self._memory.drain()
        self._graphs.destroy(*self._unrolled.values(), *([self._while] if self._while else []))
        self._memory.free(self._left)
        self._unrolled, self._while = {}, None
        if self._module is not None:
            with suppress(EngineError), ALLOCATION:  # CUDA answers every call with an error that came before
                _driver("cuModuleUnload", self._module)
        self._module = None

    def _unroll(self, passes: int) -> Enqueue:
        try:
            return self._graphs.instantiate(self._graphs.capture(partial(by_turns, *self._enqueues, 2 * passes)))
        except EngineError as error:
            self._memory.warn(f"steps are launched one by one: {error.where}: {error.got}")
            return partial(by_turns, *self._launches, 2 * passes)

    def _capture_while(self) -> Enqueue:
        image = compile_kernel(device_facts()["compute_capability"])
        with ALLOCATION:
            self._module = _driver("cuModuleLoadData", image)
        function = _driver("cuModuleGetFunction", self._module, KERNEL)
        graph = call("cudaGraphCreate", 0)
        try:
            handle = call("cudaGraphConditionalHandleCreate", graph, 1, ASSIGN_DEFAULT)
            body = _add_while(graph, handle)
            arguments = ((int(handle), self._left.address), (ctypes.c_uint64, ctypes.c_void_p))
            count_down = partial(_launch_kernel, function, self._memory.stream, arguments)

            def enqueue() -> None:
                by_turns(*self._enqueues, 2)
                count_down()

            self._graphs.capture(enqueue, into=body)
        except BaseException:
            cudart().cudaGraphDestroy(graph)
            raise
        return self._graphs.instantiate(graph)


def by_turns(first: Enqueue, second: Enqueue, steps: int) -> None:
    """Launches so many steps one by one: first, second, first ..."""
    for index in range(steps):
        (second if index % 2 else first)()


def _add_while(graph: Any, handle: Any) -> Any:
    """Adds a WHILE node to an empty graph and returns its body."""
    runtime = cudart()
    node = runtime.cudaGraphNodeParams()
    node.type = runtime.cudaGraphNodeType.cudaGraphNodeTypeConditional
    node.conditional.handle = handle
    node.conditional.type = runtime.cudaGraphConditionalNodeType.cudaGraphCondTypeWhile
    node.conditional.size = 1
    call("cudaGraphAddNode", graph, None, None, 0, node)
    return node.conditional.phGraph_out[0]


def _launch_kernel(function: Any, stream: int, arguments: Any) -> None:
    _driver("cuLaunchKernel", function, 1, 1, 1, 1, 1, 1, 0, stream, arguments, 0)


def _driver(function: str, *args: Any) -> Any:
    """As `call`, of CUDA's driver."""
    try:
        from cuda.bindings import driver

        code, *values = getattr(driver, function)(*args)
    except (ImportError, RuntimeError) as error:  # cuda.pathfinder: no such library
        raise EngineError("a CUDA call failed", where=function, got=error) from error
    if code:
        raise EngineError("a CUDA call failed", where=function, got=code.name)
    return values[0] if values else None


def compile_kernel(compute_capability: str) -> bytes:
    """The kernel for a GPU, by NVRTC, which is a library of its own. Raises EngineError without it."""
    try:
        from cuda.bindings import nvrtc

        program = _nvrtc(nvrtc, "nvrtcCreateProgram", SOURCE, b"next_pass.cu", 0, [], [])
        option = f"--gpu-architecture=sm_{compute_capability.replace('.', '')}".encode()
        _nvrtc(nvrtc, "nvrtcCompileProgram", program, 1, [option])
        image = bytes(_nvrtc(nvrtc, "nvrtcGetCUBINSize", program))
        _nvrtc(nvrtc, "nvrtcGetCUBIN", program, image)
        _nvrtc(nvrtc, "nvrtcDestroyProgram", program)
    except (ImportError, RuntimeError) as error:
        raise EngineError("NVRTC cannot be used", got=error, hint="pip install nvidia-cuda-nvrtc") from error
    return image


def _nvrtc(nvrtc: Any, function: str, *args: Any) -> Any:
    code, *values = getattr(nvrtc, function)(*args)
    if code:
        raise EngineError("NVRTC cannot compile a kernel", where=function, got=code.name)
    return values[0] if values else None
