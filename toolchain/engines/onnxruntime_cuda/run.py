"""Engines of ONNX Runtime on an NVIDIA GPU, opened: their buffers lie in the same memory as TensorRT's.

ONNX Runtime works on that memory's stream. CUDA graphs are its own: it captures one for each binding and each thread.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from toolchain.cuda.capacity import largest_open, warn_of_load, weight_bytes
from toolchain.cuda.driver import ALLOCATION, available, free_memory_bytes
from toolchain.cuda.graphs import abandon_capture
from toolchain.cuda.memory import DeviceMemory
from toolchain.engines.device_buffers import EngineBuffers
from toolchain.engines.onnxruntime.package import GPU, command
from toolchain.engines.onnxruntime.run import OnnxRuntimeEngine, install_command, open_graph, refuse_device
from toolchain.engines.onnxruntime.session import CPU_PROVIDER, Provider, session_options
from toolchain.engines.onnxruntime_cuda.provider import PROVIDER, cuda_device, cuda_session_options, load_libraries
from toolchain.errors import EngineError, first_line
from toolchain.recipe.options import OnnxRuntimeCudaOptions
from toolchain.signature import GraphSpec

NEGATION = bytes.fromhex(
    "08 0a 3a 32 0a 0b 0a 01 78 12 01 79 22 03 4e 65 67 12 01 67 5a 0f 0a 01 78 12 0a 0a 08 08 01 12 04 0a 02 08 01 62 "
    "0f 0a 01 79 12 0a 0a 08 08 01 12 04 0a 02 08 01 42 04 0a 00 10 14"
)
"""An ONNX model: y = -x of one float32, opset 20."""
NO_GRAPH = -1
"""For ONNX Runtime the number of no graph: a run under it is neither captured nor replayed."""
REFUSES_GRAPHS = re.compile(r"(cuda|capture|compute) graph|graph capture", re.IGNORECASE)


class OnnxRuntimeCudaRunner:
    """`Runner` of the backend `onnxruntime_cuda`."""

    name = "onnxruntime_cuda"

    def available(self) -> str | None:
        """Why ONNX Runtime cannot run on a GPU here, or None."""
        try:
            import onnxruntime
        except ImportError as error:
            return f"onnxruntime cannot be imported: {error} ({command(GPU)})"
        if PROVIDER not in onnxruntime.get_available_providers():
            return f"this onnxruntime has no CUDA execution provider: {command(GPU)}"
        return available() or _provider_fails()

    def refuse(self, built_on: Mapping[str, Any], options: OnnxRuntimeCudaOptions) -> str | None:
        """Why engines of another minor version of ONNX Runtime cannot run here, or None. Any GPU runs them."""
        return refuse_device(built_on, cuda_device(), ("kind",))

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        """The pip command for the version that built the engines, or None."""
        return install_command(built_on, cuda_device, GPU, ("kind",))

    def memory(
        self, folders: Sequence[Path], options: OnnxRuntimeCudaOptions, open_buckets: int | None = None
    ) -> DeviceMemory:
        """GPU memory. Warns where the weights will not fit: each session has its own copy."""
        weights = {folder: weight_bytes(folder.parent) for folder in folders}
        warn_of_load(largest_open(weights, open_buckets), 0, free_memory_bytes())  # activations: only its kernels know
        return DeviceMemory()

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: OnnxRuntimeCudaOptions,
        memory: DeviceMemory,
    ) -> OnnxRuntimeCudaEngine:
        """Opens an engine; one that ONNX Runtime refuses to capture runs without a CUDA graph. Raises EngineError."""
        load_libraries()
        captures = options.cuda_graph
        try:
            session = _open_session(folder, weights, options, memory, captures=captures)
        except EngineError as error:
            # It refuses to capture a graph of which one node has no CUDA kernel.
            if not captures or not REFUSES_GRAPHS.search(str(error.got)):
                raise
            captures = False
            session = _open_session(folder, weights, options, memory, captures=captures)
            memory.warn(f"an engine runs without a CUDA graph: {error.where}: {error.got}")
        session.disable_fallback()  # it would go on with the CPU after an error
        return OnnxRuntimeCudaEngine(session, spec, folder, memory, captures)


def _open_session(
    folder: Path, weights: Mapping[str, Path], options: OnnxRuntimeCudaOptions, memory: DeviceMemory, *, captures: bool
) -> Any:
    settings = {
        "device_id": "0",
        "user_compute_stream": str(memory.stream),
        "prefer_nhwc": _flag(options.prefer_nhwc),
        "use_tf32": _flag(options.tf32),
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": _flag(captures),
    }
    providers: list[Provider] = [(PROVIDER, settings), CPU_PROVIDER]
    with ALLOCATION:
        return open_graph(folder, weights, cuda_session_options(), providers)


def _flag(value: bool) -> str:
    return "1" if value else "0"


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """A session with static shapes, launched through I/O bindings on the GPU's memory."""

    def __init__(self, session: Any, spec: GraphSpec, folder: Path, memory: DeviceMemory, captures: bool) -> None:
        """`captures` is whether the session captures CUDA graphs. Raises EngineError for another signature."""
        super().__init__(session, spec, folder)
        self._memory = memory
        self._captures = captures
        self._buffers = EngineBuffers(spec, folder, memory)
        self._bindings: dict[int, Any] = {}  # by the number of its graph
        self._thread = threading.local()  # `launched`: numbers of the bindings that the thread has launched

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        """A launch on these buffers, run and captured once. Raises EngineError."""
        binding = self._session.io_binding()
        by_tensor = self._buffers.by_tensor(buffers)
        for tensors, bind in ((self.spec.inputs, binding.bind_input), (self.spec.outputs, binding.bind_output)):
            for tensor in tensors:
                buffer = by_tensor[tensor.name]
                bind(tensor.name, "cuda", 0, buffer.dtype, buffer.shape, buffer.address)
        number = len(self._bindings) + 1
        self._bindings[number] = binding
        launch = partial(self._launch, number, _run_options(number))
        try:
            launch()  # allocates and captures
            self._memory.synchronize()
        except EngineError as error:
            if not self._captures:
                raise
            abandon_capture(self._memory)
            launch = partial(self._launch, number, _run_options(NO_GRAPH))
            launch()
            self._memory.synchronize()
            self._memory.warn(f"an engine runs without a CUDA graph: {error.where}: {error.got}")
        return launch

    def _launch(self, number: int, settings: Any) -> None:
        """The first one in each thread allocates and captures.

        ONNX Runtime captures in CUDA's global mode, in which an allocation by any other thread spoils the capture. Its
        graphs are a thread's own and end with it: the next thread may be given the same identity, and captures anew.
        """
        assert self._session is not None, "the engine is closed"
        launched = vars(self._thread).setdefault("launched", set())
        if number in launched:
            self._run(number, settings)
            return
        with ALLOCATION:
            self._run(number, settings)
        launched.add(number)

    def _run(self, number: int, settings: Any) -> None:
        try:
            self._session.run_with_iobinding(self._bindings[number], settings)
        except Exception as error:  # of onnxruntime's dozen classes
            got = first_line(error)
            raise EngineError("ONNX Runtime cannot run the engine", where=self._folder, got=got) from error

    def close(self) -> None:
        """Waits for the GPU and frees session, bindings and buffers."""
        self._memory.drain()
        self._buffers.free()
        with ALLOCATION:
            self._bindings = {}  # bindings hold the session
            super().close()


def _run_options(graph: int) -> Any:
    """Run options that replay the CUDA graph of this number, which the first run captures, and do not wait for it."""
    import onnxruntime

    settings = onnxruntime.RunOptions()
    settings.add_run_config_entry("gpu_graph_id", str(graph))
    settings.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return settings


def _provider_fails() -> str | None:
    """Why a session on the GPU fails, or None."""
    try:
        require_provider()
    except EngineError as error:
        return f"{error.what}: {error.got or error.hint}"
    return None


@cache
def require_provider() -> None:
    """EngineError unless a session works: ONNX Runtime goes on with the CPU where libraries are missing."""
    import onnxruntime

    load_libraries()
    try:
        with ALLOCATION:
            session = onnxruntime.InferenceSession(NEGATION, session_options(1), providers=[PROVIDER])
    except Exception as error:  # of onnxruntime's dozen classes
        raise EngineError("ONNX Runtime cannot use the GPU", got=first_line(error)) from error
    if PROVIDER not in session.get_providers():
        raise EngineError("ONNX Runtime cannot load its CUDA provider", hint=command(GPU))
