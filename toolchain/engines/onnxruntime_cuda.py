"""ONNX Runtime on one NVIDIA GPU: for machines without TensorRT, and to tell its errors from the graph's.

Engines are files as on the CPU, optimised for CUDA's kernels. Their buffers lie in the same memory as TensorRT's, and
ONNX Runtime works on that memory's stream. CUDA graphs are its own: it captures one for each binding and each thread.
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.engines.cuda import available, device_facts
from toolchain.engines.device_memory import DeviceBuffer, DeviceMemory
from toolchain.engines.onnxruntime import OnnxRuntimeBackend, OnnxRuntimeEngine, Provider, _ort
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    import onnx_ir as ir

PROVIDER = "CUDAExecutionProvider"
ON_HOST = {"threads": 1, "session": {"session.use_device_allocator_for_initializers": "1"}}
"""Nothing to compute is left for the host; weights stay out of the arena, which doubles its blocks to make room."""


class OnnxRuntimeCudaBackend(OnnxRuntimeBackend):
    name = "onnxruntime_cuda"
    run_options: tuple[str, ...] = ("cuda_graph", "prefer_nhwc", "tf32")
    providers: tuple[Provider, ...] = (PROVIDER, "CPUExecutionProvider")
    forecasts = False  # how CUDA's kernels and their arena go about memory is another matter

    def available(self) -> str | None:
        try:
            ort = _ort()
        except ImportError as error:
            return f"onnxruntime cannot be imported: {error}"
        if PROVIDER not in ort.get_available_providers():
            return "this onnxruntime has no CUDA execution provider: pip install onnxruntime-gpu"
        return available()

    def device(self) -> dict[str, Any]:
        """Kernels are chosen when an engine is opened: graphs optimised for one GPU run on another. EngineError."""
        return {"kind": "cuda", "name": device_facts()["name"], "onnxruntime": super().device()["onnxruntime"]}

    def refuse(self, built_on: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
        return self._refuse(built_on, ("kind",))

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
        progress: Callable[[str, float], None] = lambda phase, share: None,
    ) -> None:
        _load_libraries()
        super().build(graph, weights, out, {**options, **ON_HOST}, progress)

    def memory(self, folders: Sequence[Path], options: Mapping[str, Any], open_buckets: int | None = None) -> Any:
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
            "enable_cuda_graph": _flag(options["cuda_graph"]),
            "prefer_nhwc": _flag(options["prefer_nhwc"]),
            "use_tf32": _flag(options["tf32"]),
            "arena_extend_strategy": "kSameAsRequested",
        }

        def session() -> Any:
            providers: list[Provider] = [(PROVIDER, dict(settings)), "CPUExecutionProvider"]
            return self._session(folder, weights, {**options, **ON_HOST}, providers)

        try:
            made = session()
        except EngineError as error:
            if not options["cuda_graph"]:
                raise
            # It refuses to capture a graph of which one node has no CUDA kernel, and says so in words that change.
            settings["enable_cuda_graph"] = _flag(False)
            made = session()
            memory.warn(f"an engine runs without a CUDA graph: {error.where}: {error.got}")
        made.disable_fallback()  # it would go on with the CPU after an error
        return OnnxRuntimeCudaEngine(made, spec, folder, memory)


class OnnxRuntimeCudaEngine(OnnxRuntimeEngine):
    """A session with static shapes, launched through I/O bindings on the GPU's memory."""

    def __init__(self, session: Any, spec: GraphSpec, folder: Path, memory: DeviceMemory) -> None:
        super().__init__(session, spec, folder)
        self._memory = memory
        self._unread: dict[str, DeviceBuffer] = {}
        self._bindings: dict[int, Any] = {}  # by the number of its graph

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        binding = self._session.io_binding()
        for tensor in self.spec.inputs:
            binding.bind_input(*self._place(tensor, buffers.get(tensor.name)))
        for tensor in self.spec.outputs:
            binding.bind_output(*self._place(tensor, buffers.get(tensor.name) or self._nowhere(tensor)))
        number = len(self._bindings) + 1
        self._bindings[number] = binding
        settings = _ort().RunOptions()
        settings.add_run_config_entry("gpu_graph_id", str(number))
        settings.add_run_config_entry("disable_synchronize_execution_providers", "1")

        def launch() -> None:
            assert self._session is not None, "the engine is closed"
            try:
                self._session.run_with_iobinding(self._bindings[number], settings)
            except Exception as error:  # of onnxruntime's dozen classes
                got = str(error).strip().splitlines()[0]
                raise EngineError("ONNX Runtime cannot run the engine", where=self._folder, got=got) from error

        launch()  # allocates and captures
        self._memory.synchronize()
        return launch

    def close(self) -> None:
        self._memory.release()
        self._memory.free(*self._unread.values())
        self._bindings, self._unread = {}, {}  # bindings hold the session
        super().close()

    def _place(self, tensor: TensorSpec, buffer: DeviceBuffer | None) -> tuple[Any, ...]:
        """What a binding wants to know: name, device and its number, type, shape, address."""
        expected = f"{tensor.name}: {tensor.dtype} {list(tensor.shape)}"
        if buffer is None:
            raise EngineError("a buffer is missing", where=self._folder, expected=expected)
        if str(buffer.dtype) != tensor.dtype or buffer.shape != tensor.shape:
            got = f"{buffer.dtype} {list(buffer.shape)}"
            raise EngineError("a buffer does not fit", where=self._folder, expected=expected, got=got)
        return tensor.name, "cuda", 0, buffer.dtype, buffer.shape, buffer.address

    def _nowhere(self, tensor: TensorSpec) -> DeviceBuffer:
        """Where an output goes that nobody asked for: a captured graph wants a fixed address for each."""
        if tensor.name not in self._unread:
            self._unread[tensor.name] = self._memory.zeros(tensor.shape, tensor.dtype)
        return self._unread[tensor.name]


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


def _flag(value: bool) -> str:
    return "1" if value else "0"


def _load_libraries() -> None:
    """Lets ONNX Runtime find CUDA's libraries where pip put them; of others the session's error tells."""
    with contextlib.redirect_stdout(io.StringIO()):
        _ort().preload_dlls()
