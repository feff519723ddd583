"""ONNX Runtime on the CPU.

Building optimises the graph for this machine and saves it, so that opening does no graph work. The saved graph holds no
weights: its initializers point into the component's weight files, which ONNX Runtime maps into memory, so that all
buckets and all processes share their pages. (Its MatMul kernels still keep packed copies per session.) Tensors that the
optimiser made itself, such as reordered convolution weights, depend on the weights but not on the bucket: they go into
one packed file that all buckets share. What little a bucket has for itself stays in its graph.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import platform
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolchain.engines.buffers import HostMemory
from toolchain.engines.onnxruntime.package import CPU, EITHER, command, installed, module_version, warn_of_clash
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.store.facts import ENGINE_FACTS
from toolchain.weights.mapped import MappedWeights, TensorRef

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("toolchain")

GRAPH = "graph.onnx"
WEIGHTS = "weights.safetensors"
PACKED = "packed.safetensors"
FILES = {"weights": WEIGHTS, "packed": PACKED}
"""File name of each role of weight file; they lie side by side when an engine is opened."""
PACKED_FROM_BYTES = 1024
LEVELS = {"basic": "ORT_ENABLE_BASIC", "extended": "ORT_ENABLE_EXTENDED", "all": "ORT_ENABLE_ALL"}


@cache
def cpu_features() -> str:
    """The instruction set that decides ONNX Runtime's blocked layouts and kernels, such as "x86_64-avx512"."""
    machine = platform.machine().lower().replace("amd64", "x86_64")
    try:
        flags = next(
            line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")
        ).split()
    except (OSError, StopIteration):
        return machine
    level = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "sse"
    return f"{machine}-{level}"


def physical_cores() -> int:
    """Cores that this process may use, without counting hyper-threads."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


Provider = str | tuple[str, dict[str, str]]


class OnnxRuntimeBackend:
    name = "onnxruntime"
    providers: tuple[Provider, ...] = ("CPUExecutionProvider",)
    dtypes: tuple[str, ...] = ("float32", "float16")  # its CPU kernels have no bfloat16 convolution
    run_options: tuple[str, ...] = ("threads",)
    forecasts = True
    """Whether it writes down beside an engine how much memory that will take."""

    def available(self) -> str | None:
        try:
            import onnxruntime
        except ImportError as error:
            return f"onnxruntime cannot be imported: {error} ({EITHER})"
        if "CPUExecutionProvider" not in onnxruntime.get_available_providers():
            return "this onnxruntime has no CPU execution provider"
        return None

    def device(self) -> dict[str, Any]:
        return {"kind": "cpu", "cpu": cpu_features(), "onnxruntime": module_version()}

    def refuse(self, built_on: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
        return self._refuse(built_on, ("kind", "cpu"))

    def _refuse(self, built_on: Mapping[str, Any], alike: tuple[str, ...]) -> str | None:
        warn_of_clash()
        here = self.device()
        for what in alike:
            if built_on.get(what) != here[what]:
                return f"built on {built_on.get(what)}, this machine is {here[what]}"
        # Optimised graphs use ONNX Runtime's internal operators, which have no compatibility promise between minors.
        built, ours = (str(v.get("onnxruntime")) for v in (built_on, here))
        if _minor(built) != _minor(ours):
            return f"built with onnxruntime {built}, this machine has {ours}"
        return None

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        return self._install(built_on, next(iter(installed()), CPU), ("kind", "cpu"))

    def _install(self, built_on: Mapping[str, Any], package: str, alike: tuple[str, ...]) -> str | None:
        built = str(built_on.get("onnxruntime"))
        try:
            here = self.device()
        except EngineError:
            return command(package, built)
        fits = any(built_on.get(what) != here[what] for what in alike) or _minor(built) == _minor(here["onnxruntime"])
        return None if fits else command(package, built)

    def problems(self, options: Mapping[str, Any]) -> list[str]:
        warn_of_clash()
        return []

    def prepare(self, graph: ir.Model) -> ir.Model:
        from toolchain.graph.transpose import transpose_weights

        return transpose_weights(graph)

    def merges(self, options: Mapping[str, Any]) -> bool:
        return False

    def reads_weights(self, options: Mapping[str, Any]) -> bool:
        return True

    def packs(self, options: Mapping[str, Any]) -> bool:
        return bool(options["optimization"] == "all")  # the level whose layout pass reorders convolution weights

    def pack(self, graph: Path, weights: Mapping[str, Path], out: Path, options: Mapping[str, Any]) -> None:
        from toolchain.graph.placeholder import static_shape
        from toolchain.weights.derived import DTYPES
        from toolchain.weights.safetensors import write_safetensors

        with (
            _optimized(graph, weights["weights"], out, options, self.providers) as model,
            MappedWeights(weights["weights"]) as base,
        ):
            known = _index({"weights": base})
            made = {}
            for name, tensor in _initializers(model):
                large = tensor.nbytes > PACKED_FROM_BYTES and tensor.dtype in DTYPES  # what else there is stays inside
                if large and _content(tensor.numpy()) not in known:
                    made[name] = (DTYPES[tensor.dtype], static_shape(tensor), tensor)
            names = sorted(made)
            write_safetensors(out / PACKED, [(n, *made[n][:2]) for n in names], lambda n: made[n][2].numpy())

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: Mapping[str, Any],
        progress: Callable[[str, float | None], None] = lambda phase, share: None,
    ) -> None:
        import onnx_ir as ir

        from toolchain.graph.placeholder import static_shape

        with _optimized(graph, weights["weights"], out, options, self.providers) as model:
            files = {role: MappedWeights(path) for role, path in weights.items()}
            known = _index(files)
            for name, tensor in _initializers(model):
                found = known.get(_content(tensor.numpy()))
                value = model.graph.initializers[name]
                if found is None:
                    value.const_value = ir.Tensor(tensor.numpy().copy(), dtype=tensor.dtype, name=name)
                else:
                    role, ref = found
                    place = (FILES[role], ref.offset, ref.nbytes, tensor.dtype)
                    value.const_value = ir.ExternalTensor(*place, shape=ir.Shape(static_shape(tensor)), name=name)
            ir.save(model, out / GRAPH)
            if self.forecasts:
                from toolchain.engines.onnxruntime.activations import memory_facts

                (out / ENGINE_FACTS).write_text(json.dumps(memory_facts(model, cpu_features()), indent=1) + "\n")
            for mapped in files.values():
                mapped.close()

    def memory(
        self, folders: Sequence[Path], options: Mapping[str, Any], open_buckets: int | None = None
    ) -> HostMemory:
        return HostMemory()

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: Mapping[str, Any],
        memory: Any,
    ) -> OnnxRuntimeEngine:
        """`options` may hold what no recipe can: "profile", where the file of `end_profile` is to begin its name."""
        return OnnxRuntimeEngine(self._session(folder, weights, options, self.providers), spec, folder)

    def _session(
        self, folder: Path, weights: Mapping[str, Path], options: Mapping[str, Any], providers: Sequence[Provider]
    ) -> Any:
        settings = _session_options(options)
        settings.graph_optimization_level = _ort().GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            graph = (folder / GRAPH).read_bytes()
        except OSError as error:
            raise EngineError("an engine's graph cannot be read", where=folder / GRAPH, got=error) from error
        # The graph comes as bytes so that its weights may lie in a folder of their own, which no path may leave.
        with _within_one_folder(weights, settings) as place:
            settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(place))
            return _open_session(graph, settings, folder / GRAPH, providers)


class OnnxRuntimeEngine:
    """A session with static shapes, launched through I/O bindings on host memory."""

    def __init__(self, session: Any, spec: GraphSpec, folder: Path) -> None:
        self.spec = spec
        self._session = session
        self._folder = folder
        self._check_signature()

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        session = self._session
        binding = session.io_binding()
        for tensor in self.spec.inputs:
            _check_buffer(tensor, buffers.get(tensor.name), self._folder)
            array = buffers[tensor.name]
            binding.bind_input(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for tensor in self.spec.outputs:
            if tensor.name in buffers:
                _check_buffer(tensor, buffers[tensor.name], self._folder)
                array = buffers[tensor.name]
                binding.bind_output(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        kept = dict(buffers)  # the binding holds bare addresses

        def launch() -> None:
            assert kept is not None
            session.run_with_iobinding(binding)

        return launch

    def end_profile(self) -> Path:
        """Ends the profile that opening began, and tells its file: ONNX Runtime's JSON, all launches so far."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        self._session = None

    def _check_signature(self) -> None:
        for side, tensors in (("inputs", self.spec.inputs), ("outputs", self.spec.outputs)):
            nodes = getattr(self._session, f"get_{side}")()
            got = [(n.name, tuple(n.shape)) for n in nodes]
            expected = [(t.name, t.shape) for t in tensors]
            if got != expected:
                raise EngineError(
                    f"the engine has other {side} than its manifest says",
                    where=self._folder,
                    expected=expected,
                    got=got,
                )


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def _ort() -> Any:
    import onnxruntime

    return onnxruntime


def _session_options(options: Mapping[str, Any]) -> Any:
    settings = _ort().SessionOptions()
    settings.intra_op_num_threads = options["threads"] or physical_cores()
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    for name, value in options.get("session", {}).items():
        settings.add_session_config_entry(name, value)
    if "profile" in options:
        settings.enable_profiling = True
        settings.profile_file_prefix = options["profile"]
    return settings


@contextlib.contextmanager
def _within_one_folder(weights: Mapping[str, Path], settings: Any) -> Iterator[Path]:
    """The folder of the weight files, which must lie in it for ONNX Runtime to map them; what is mapped may go then.

    In a snapshot from the hub they are links to files elsewhere. Hard links stand for them while a session is opened;
    where none can be made, on a read-only disk say, ONNX Runtime is given the content and each session copies it.
    """
    place = weights["weights"].parent
    if not any(path.is_symlink() for path in weights.values()):
        yield place
        return
    with contextlib.ExitStack() as stack:
        try:
            near = weights["weights"].resolve().parent
            scratch = tempfile.TemporaryDirectory(dir=near, prefix=".diffbuild-", ignore_cleanup_errors=True)
            place = Path(stack.enter_context(scratch))
            for path in weights.values():
                os.link(path.resolve(), place / path.name)
        except OSError as error:
            log.warning("no link to a weight file can be made (%s): every engine holds a copy of its weights", error)
            files = {path.name: np.fromfile(path, np.uint8) for path in weights.values()}
            sizes = [data.nbytes for data in files.values()]
            settings.add_external_initializers_from_files_in_memory([*files], [*files.values()], sizes)
        yield place


def _open_session(graph: str | bytes, settings: Any, where: Path, providers: Sequence[Provider]) -> Any:
    try:
        session = _ort().InferenceSession(graph, settings, providers=list(providers))
    except Exception as error:  # onnxruntime raises a dozen classes of its own, all derived straight from Exception
        got = str(error).strip().splitlines()[0]
        raise EngineError("ONNX Runtime cannot open the graph", where=where, got=got) from error
    wanted = [p if isinstance(p, str) else p[0] for p in providers]
    if session.get_providers()[0] != wanted[0]:  # it only warns of one whose libraries cannot be loaded
        got = ", ".join(session.get_providers())
        raise EngineError("ONNX Runtime cannot use an execution provider", where=where, expected=wanted[0], got=got)
    return session


@contextlib.contextmanager
def _optimized(
    graph: Path, weights: Path, out: Path, options: Mapping[str, Any], providers: Sequence[Provider]
) -> Iterator[ir.Model]:
    """ONNX Runtime's optimised form of a graph, its initializers in a scratch file below `out` while in use."""
    import onnx_ir as ir

    from toolchain.graph.attention import fuse_attention
    from toolchain.graph.placeholder import is_weight
    from toolchain.weights.derived import DTYPES

    element_types = {name: int(dtype) for dtype, name in DTYPES.items()}
    with tempfile.TemporaryDirectory(dir=out) as scratch, MappedWeights(weights) as mapped:
        saved = Path(scratch) / "optimized.onnx"
        settings = _session_options(options)
        settings.graph_optimization_level = getattr(_ort().GraphOptimizationLevel, LEVELS[options["optimization"]])
        settings.optimized_model_filepath = str(saved)
        settings.add_session_config_entry("session.optimized_model_external_initializers_file_name", "optimized.bin")
        settings.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "0")
        model = ir.load(graph)
        names = [str(name) for name, value in model.graph.initializers.items() if is_weight(value)]
        kinds = [element_types[mapped.refs[name].dtype] for name in names]
        make = _ort().OrtValue.ortvalue_from_numpy_with_onnx_type
        values = [make(mapped.array(name), kind) for name, kind in zip(names, kinds, strict=True)]
        settings.add_external_initializers(names, values)
        if options["optimization"] != "basic":
            model = fuse_attention(model)
        _open_session(ir.to_proto(model).SerializeToString(), settings, graph, providers)
        yield ir.load(saved)


def _initializers(model: ir.Model) -> list[tuple[str, ir.TensorProtocol]]:
    found = []
    for name, value in model.graph.initializers.items():
        assert value.const_value is not None
        found.append((str(name), value.const_value))
    return found


def _index(files: Mapping[str, MappedWeights]) -> dict[Any, tuple[str, TensorRef]]:
    """Where every tensor of the weight files lies, by its content."""
    return {_content(f.array(key)): (role, f.refs[key]) for role, f in files.items() for key in f.refs}


def _content(array: NDArray[Any]) -> tuple[tuple[int, ...], int, bytes]:
    """Identifies a tensor by its shape and bytes."""
    return array.shape, array.dtype.itemsize, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _check_buffer(tensor: TensorSpec, array: NDArray[Any] | None, where: Path) -> None:
    expected = f"{tensor.name}: {tensor.dtype} {list(tensor.shape)}, contiguous"
    if array is None:
        raise EngineError("a buffer is missing", where=where, expected=expected)
    if str(array.dtype) != tensor.dtype or array.shape != tensor.shape or not array.flags.c_contiguous:
        raise EngineError(
            "a buffer does not fit", where=where, expected=expected, got=f"{array.dtype} {list(array.shape)}"
        )
