"""ONNX Runtime on one NVIDIA GPU: for machines without TensorRT, and to tell its errors from the graph's.

Engines are files as on the CPU, optimised for CUDA's kernels. Their buffers lie in the same memory as TensorRT's, and
ONNX Runtime works on that memory's stream. CUDA graphs are its own: it captures one for each binding and each thread.
"""

from __future__ import annotations

import contextlib
import io
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.cuda.driver import available, device_facts, free_memory_bytes
from toolchain.cuda.forecast import largest_open, warn_of_load, weight_bytes
from toolchain.cuda.memory import ALLOCATION, DeviceMemory
from toolchain.cuda.places import Places
from toolchain.engines.onnxruntime.backend import (
    OnnxRuntimeBackend,
    OnnxRuntimeEngine,
    Provider,
    _ort,
    _session_options,
)
from toolchain.engines.onnxruntime.package import GPU, command
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDER = "CUDAExecutionProvider"
ON_HOST = {"threads": 1, "session": {"session.use_device_allocator_for_initializers": "1"}}
"""Nothing to compute is left for the host; weights stay out of the arena, which doubles its blocks to make room."""

NEGATION = bytes.fromhex(
    "08 0a 3a 32 0a 0b 0a 01 78 12 01 79 22 03 4e 65 67 12 01 67 5a 0f 0a 01 78 12 0a 0a 08 08 01 12 04 0a 02 08 01 62 "
    "0f 0a 01 79 12 0a 0a 08 08 01 12 04 0a 02 08 01 42 04 0a 00 10 14"
)
"""An ONNX model: y = -x of one float32, opset 20."""
NO_GRAPH = -1
"""For ONNX Runtime the number of no graph: a run under it is neither captured nor replayed."""
REFUSES_GRAPHS = re.compile(r"(cuda|capture|compute) graph|graph capture", re.IGNORECASE)


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    name = "onnxruntime_cuda"
    run_options: tuple[str, ...] = ("cuda_graph", "prefer_nhwc", "tf32")
    providers: tuple[Provider, ...] = (PROVIDER, "CPUExecutionProvider")
    forecasts = False  # how CUDA's kernels and their arena go about memory is another matter

    def available(self) -> str | None:
        try:
            ort = _ort()
        except ImportError as error:
            return f"onnxruntime cannot be imported: {error} ({command(GPU)})"
        if PROVIDER not in ort.get_available_providers():
            return f"this onnxruntime has no CUDA execution provider: {command(GPU)}"
        return available() or _provider_fails()

    def device(self) -> dict[str, Any]:
        """Kernels are chosen when an engine is opened: graphs optimised for one GPU run on another. EngineError."""
        return {"kind": "cuda", "name": device_facts()["name"], "onnxruntime": super().device()["onnxruntime"]}

    def refuse(self, built_on: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
        return self._refuse(built_on, ("kind",))

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        return self._install(built_on, GPU, ("kind",))

    def prepare(self, graph: ir.Model) -> ir.Model:
        return _float_argmax(super().prepare(graph))

    def packs(self, options: Mapping[str, Any]) -> bool:
        return False  # CUDA's kernels take weights as they are

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: Mapping[str, Any],
        progress: Callable[[str, float | None], None] = lambda phase, share: None,
    ) -> None:
        _load_libraries()
        with ALLOCATION:  # it opens a session
            super().build(graph, weights, out, {**options, **ON_HOST}, progress)

    def memory(self, folders: Sequence[Path], options: Mapping[str, Any], open_buckets: int | None = None) -> Any:
        # Each session has its own copy. Of activations only CUDA's kernels know.
        weights = {folder: weight_bytes(folder.parent) for folder in folders}
        warn_of_load(largest_open(weights, open_buckets), 0, free_memory_bytes())
        return DeviceMemory("off")

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: Mapping[str, Any],
        memory: DeviceMemory,
    ) -> Any:
        _load_libraries()
        settings = {
            "device_id": "0",
            "user_compute_stream": str(memory.stream),
            "prefer_nhwc": _flag(options["prefer_nhwc"]),
            "use_tf32": _flag(options["tf32"]),
            "arena_extend_strategy": "kSameAsRequested",
        }

        def session(captures: bool) -> Any:
            own = {**settings, "enable_cuda_graph": _flag(captures)}
            providers: list[Provider] = [(PROVIDER, own), "CPUExecutionProvider"]
            with ALLOCATION:
                return self._session(folder, weights, {**options, **ON_HOST}, providers)

        captures: bool = options["cuda_graph"]
        try:
            made = session(captures)
        except EngineError as error:
            # It refuses to capture a graph of which one node has no CUDA kernel.
            if not captures or not REFUSES_GRAPHS.search(str(error.got)):
                raise
            captures = False
            made = session(captures)
            memory.warn(f"an engine runs without a CUDA graph: {error.where}: {error.got}")
        made.disable_fallback()  # it would go on with the CPU after an error
        return OnnxRuntimeCudaEngine(made, spec, folder, memory, captures)


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """A session with static shapes, launched through I/O bindings on the GPU's memory."""

    def __init__(self, session: Any, spec: GraphSpec, folder: Path, memory: DeviceMemory, captures: bool) -> None:
        super().__init__(session, spec, folder)
        self._memory = memory
        self._captures = captures
        self._places = Places(spec, folder, memory)
        self._bindings: dict[int, Any] = {}  # by the number of its graph
        self._begun = threading.local()  # `bindings`: numbers of those that the thread has launched

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        binding = self._session.io_binding()
        places = self._places.of(buffers)
        for tensors, bind in ((self.spec.inputs, binding.bind_input), (self.spec.outputs, binding.bind_output)):
            for tensor in tensors:
                there = places[tensor.name]
                bind(tensor.name, "cuda", 0, there.dtype, there.shape, there.address)
        number = len(self._bindings) + 1
        self._bindings[number] = binding
        launch = partial(self._launch, number, _settings(number))
        try:
            launch()  # allocates and captures
            self._memory.synchronize()
        except EngineError as error:
            if not self._captures:
                raise
            self._memory.abandon_capture()
            launch = partial(self._launch, number, _settings(NO_GRAPH))
            launch()
            self._memory.synchronize()
            self._memory.warn(f"an engine runs without a CUDA graph: {error.where}: {error.got}")
        return launch

    def _launch(self, number: int, settings: Any) -> None:
        """The first one in each thread allocates and captures.

        ONNX Runtime captures in CUDA's global mode, in which an allocation by any other thread spoils the capture. What
        a thread has begun ends with it: the next one may be given its identity, and captures anew.
        """
        assert self._session is not None, "the engine is closed"
        begun = vars(self._begun).setdefault("bindings", set())
        if number in begun:
            self._run(number, settings)
            return
        with ALLOCATION:
            self._run(number, settings)
        begun.add(number)

    def _run(self, number: int, settings: Any) -> None:
        try:
            self._session.run_with_iobinding(self._bindings[number], settings)
        except Exception as error:  # of onnxruntime's dozen classes
            got = str(error).strip().splitlines()[0]
            raise EngineError("ONNX Runtime cannot run the engine", where=self._folder, got=got) from error

    def close(self) -> None:
        self._memory.release()
        self._places.free()
        with ALLOCATION:
            self._bindings = {}  # bindings hold the session
            super().close()


def _provider_fails() -> str | None:
    """Why a session on the GPU is not one, or None."""
    try:
        _require_provider()
    except EngineError as error:
        return f"{error.what}: {error.got or error.hint}"
    return None


@cache
def _require_provider() -> None:
    """EngineError unless a session works: ONNX Runtime goes on with the CPU where libraries are missing."""
    _load_libraries()
    settings = _session_options({"threads": 1})
    try:
        with ALLOCATION:
            found = _ort().InferenceSession(NEGATION, settings, providers=[PROVIDER]).get_providers()
    except Exception as error:  # of onnxruntime's dozen classes
        got = str(error).strip().splitlines()[0]
        raise EngineError("ONNX Runtime cannot use the GPU", got=got) from error
    if PROVIDER not in found:
        raise EngineError("ONNX Runtime cannot load its CUDA provider", hint=command(GPU))


def _float_argmax(model: ir.Model) -> ir.Model:
    """CUDA's ArgMax takes floats alone. CLIP finds the end of a prompt with it, in token ids: exact in float32."""
    import onnx_ir as ir

    for node in list(model.graph):
        value = node.inputs[0] if node.op_type == "ArgMax" else None
        if value is not None and value.dtype in (ir.DataType.INT32, ir.DataType.INT64):
            made = ir.Value(name=f"{value.name}_float", shape=value.shape, type=ir.TensorType(ir.DataType.FLOAT))
            cast = ir.node("Cast", [value], {"to": ir.DataType.FLOAT}, outputs=[made], name=f"{node.name}_float")
            model.graph.insert_before(node, cast)
            node.replace_input_with(0, made)
    return model


def _settings(graph: int) -> Any:
    """Of a run that replays the CUDA graph of this number, which the first one captures, and does not wait for it."""
    settings = _ort().RunOptions()
    settings.add_run_config_entry("gpu_graph_id", str(graph))
    settings.add_run_config_entry("disable_synchronize_execution_providers", "1")
    return settings


def _flag(value: bool) -> str:
    return "1" if value else "0"


def _load_libraries() -> None:
    """Lets ONNX Runtime find CUDA's libraries where pip put them; of others the session's error tells."""
    with contextlib.redirect_stdout(io.StringIO()):
        _ort().preload_dlls()
