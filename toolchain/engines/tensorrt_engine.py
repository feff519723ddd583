"""TensorRT's runtime: `engine.plan` and `engine.json` in a folder -> an engine whose launches are captured CUDA graphs.

A plan is machine code: bundles are read from those whom one would let run a program, and their sha256 is compared
before anything gets here. TensorRT may not run what a plan brings along for the host, and no recipe can ask for that:
a plan for later versions of TensorRT would hold a runtime of its own.
"""

from __future__ import annotations

import json
import logging
import mmap
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.engines.cuda import free_memory_bytes
from toolchain.engines.device_memory import ALIGNMENT, DeviceBuffer, DeviceMemory
from toolchain.engines.forecast import load_warning
from toolchain.errors import EngineError
from toolchain.memory import FACTS
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.weights import MappedWeights

log = logging.getLogger("toolchain")

PLAN = "engine.plan"
FORMAT = 1
REBUILD = "build it again, from the same recipe"
LOG_LINES = 8
# trt.nptype raises for bfloat16.
DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip


def open_memory(folders: Sequence[Path], options: Mapping[str, Any], open_buckets: int | None = None) -> DeviceMemory:
    """The memory of a pipeline, with activations shared by the engines in `folders`. Raises EngineError."""
    facts = {folder: read_facts(folder) for folder in folders}
    needed = max((f["activation_bytes"] for f in facts.values()), default=0)
    weights: dict[Path, list[int]] = {}
    for folder, f in facts.items():
        size = f["plan_bytes"] + (_weight_bytes(folder) if f["stripped"] else 0)
        weights.setdefault(folder.parent, []).append(size)
    largest = sum(sum(sorted(sizes, reverse=True)[:open_buckets]) for sizes in weights.values())
    warning = load_warning(largest, needed, free_memory_bytes())
    if warning is not None:
        log.warning("%s", warning)
    memory = DeviceMemory(options["cuda_graph"])
    memory.reserve(needed)
    return memory


def _weight_bytes(folder: Path) -> int:
    """Of the file that a stripped engine is filled from: a bundle has it beside the component's engines."""
    return sum(file.stat().st_size for file in folder.parent.glob("*.safetensors"))


def read_facts(folder: Path) -> dict[str, Any]:
    """What engine.json says. EngineError when it cannot be read or is of another format."""
    path = folder / FACTS
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
        version = facts["format"]
        kinds = {"activation_bytes": int, "plan_bytes": int, "stripped": bool, "options": dict}
        wrong = [name for name, kind in kinds.items() if type(facts[name]) is not kind]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EngineError("an engine's description cannot be read", where=path, got=error, hint=REBUILD) from error
    if version != FORMAT or wrong:
        raise EngineError(
            "an engine's description is of another format",
            where=path,
            expected=f"format {FORMAT}",
            got=f"format {version}" + "".join(f", {name} {facts[name]!r}" for name in wrong),
            hint=REBUILD,
        )
    return dict(facts)


class TensorRtEngine:
    """A deserialised plan with static shapes. Every binding has a context; all contexts share the memory's scratch."""

    def __init__(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: Mapping[str, Any],
        memory: DeviceMemory,
    ) -> None:
        self.spec = spec
        self._folder = folder
        self._memory = memory
        self._bindings: list[_Binding] = []
        self._launches: list[Callable[[], None]] = []
        self._unread: dict[str, DeviceBuffer] = {}
        facts = read_facts(folder)
        self._log = _logger(_trt())
        self._log.lines.clear()  # what others said is not this one's failure
        self._runtime: Any = None
        self._engine: Any = None
        try:
            self._runtime = self._start()
            self._engine = self._deserialize(facts)
            if facts["stripped"]:
                self._refit(facts["refit"], weights["weights"])
            self._check_signature()
        except BaseException:
            self.close()
            raise

    def bind(self, buffers: Mapping[str, DeviceBuffer]) -> Callable[[], None]:
        addresses = {}
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            buffer = buffers.get(tensor.name)
            if buffer is None and tensor in self.spec.outputs:
                buffer = self._nowhere(tensor)
            addresses[tensor.name] = _address(tensor, buffer, self._folder)
        binding = _Binding(self._context(addresses), self._memory.stream, self._failure)
        self._bindings.append(binding)
        launch = self._memory.capture(binding)
        self._launches.append(launch)
        return launch

    def close(self) -> None:
        self._memory.release(*self._launches)
        for binding in self._bindings:
            binding.context = None
        self._memory.free(*self._unread.values())
        self._bindings, self._launches, self._unread = [], [], {}
        self._engine = None  # after its contexts and before its runtime
        self._runtime = None

    def _start(self) -> Any:
        try:
            return _trt().Runtime(self._log)
        except TypeError as error:  # what the binding makes of the null that a failed start of CUDA gives
            raise self._failure("TensorRT cannot start its runtime") from error

    def _deserialize(self, facts: Mapping[str, Any]) -> Any:
        path = self._folder / PLAN
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                if len(plan) != facts["plan_bytes"]:
                    raise ValueError(f"{len(plan)} bytes where {FACTS} says {facts['plan_bytes']}")
                engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
            raise EngineError("an engine's plan cannot be read", where=path, got=error, hint=REBUILD) from error
        if engine is None:
            raise self._failure("TensorRT cannot open the engine", hint=REBUILD)
        return engine

    def _refit(self, recipe: Mapping[str, Any], file: Path) -> None:
        """Fills a stripped plan from the component's weight file, through the graph that it was built from."""
        trt = _trt()
        try:
            refitter = trt.Refitter(self._engine, self._log)
        except TypeError as error:
            raise self._failure("TensorRT cannot fill the engine with its weights", hint=REBUILD) from error
        parser = trt.OnnxParserRefitter(refitter, self._log)
        graph = _read(self._folder / recipe["graph"])
        with MappedWeights(file) as weights:
            # The parser keeps bare addresses: the arrays live until the weights are in the engine.
            arrays = {name: np.require(weights.array(name), requirements=["C", "A"]) for name in recipe["weights"]}
            filled = (
                parser.load_model_proto(graph)
                and all(parser.load_initializer(name, a.ctypes.data, a.nbytes) for name, a in arrays.items())
                and parser.refit_model_proto()
            )
            missing = refitter.get_missing_weights()
            if not filled or missing or not refitter.refit_cuda_engine():
                errors = [parser.get_error(i).desc() for i in range(parser.num_errors)]
                lacking = [f"no weights for {', '.join(missing[:3])} and {len(missing)} in all"] if missing else []
                raise self._failure("TensorRT cannot fill the engine with its weights", [*errors, *lacking], REBUILD)

    def _check_signature(self) -> None:
        trt, engine = _trt(), self._engine
        found: dict[str, set[tuple[str, str, tuple[int, ...]]]] = {"INPUT": set(), "OUTPUT": set()}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = engine.get_tensor_dtype(name).name
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                dtype = f"host {dtype}"
            tensor = (name, DTYPES.get(dtype, dtype), tuple(engine.get_tensor_shape(name)))
            found[engine.get_tensor_mode(name).name].add(tensor)
        for side, tensors in (("INPUT", self.spec.inputs), ("OUTPUT", self.spec.outputs)):
            expected = {(t.name, t.dtype, t.shape) for t in tensors}
            if found[side] != expected:
                raise EngineError(
                    f"the engine has other {side.lower()}s than its manifest says",
                    where=self._folder,
                    expected=sorted(expected - found[side]),
                    got=sorted(found[side] - expected),
                    hint=REBUILD,
                )

    def _context(self, addresses: Mapping[str, int]) -> Any:
        context = self._engine.create_execution_context(_trt().ExecutionContextAllocationStrategy.USER_MANAGED)
        if context is None:
            raise self._failure("TensorRT cannot make an execution context")
        block = self._memory.scratch(self._engine.device_memory_size_v2)
        context.set_device_memory(block.address, block.nbytes)
        refused = [name for name, address in addresses.items() if not context.set_tensor_address(name, address)]
        unknown = context.infer_shapes()
        if refused or unknown:
            raise self._failure("TensorRT does not take the buffers", [f"refused: {', '.join([*refused, *unknown])}"])
        return context

    def _nowhere(self, tensor: TensorSpec) -> DeviceBuffer:
        """Where an output goes that nobody asked for: TensorRT wants an address for each."""
        if tensor.name not in self._unread:
            self._unread[tensor.name] = self._memory.zeros(tensor.shape, tensor.dtype)
        return self._unread[tensor.name]

    def _failure(self, what: str, details: Sequence[str] = (), hint: str | None = None) -> EngineError:
        """An error that says what TensorRT logged last."""
        lines = [*details, *self._log.lines.copy()]  # TensorRT's threads may still be writing
        return EngineError(what, where=self._folder, got="\n    ".join(lines) or "no reason given", hint=hint)


class _Binding:
    """Enqueues one execution context. Engine and caller share it, so that the engine can take the context away."""

    def __init__(self, context: Any, stream: int, failure: Callable[[str], EngineError]) -> None:
        self.context = context
        self._stream = stream
        self._failure = failure

    def __call__(self) -> None:
        assert self.context is not None, "the engine is closed"
        if not self.context.execute_async_v3(self._stream):
            raise self._failure("TensorRT cannot run the engine")


def _address(tensor: TensorSpec, buffer: DeviceBuffer | None, where: Path) -> int:
    expected = f"{tensor.name}: {tensor.dtype} {list(tensor.shape)}, at a multiple of {ALIGNMENT} bytes"
    if buffer is None:
        raise EngineError("a buffer is missing", where=where, expected=expected)
    if str(buffer.dtype) != tensor.dtype or buffer.shape != tensor.shape or buffer.address % ALIGNMENT:
        got = f"{buffer.dtype} {list(buffer.shape)} at {buffer.address:#x}"
        raise EngineError("a buffer does not fit", where=where, expected=expected, got=got)
    return buffer.address


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError("a file of an engine cannot be read", where=path, got=error, hint=REBUILD) from error


def _trt() -> Any:
    import tensorrt

    return tensorrt


@cache
def _logger(trt: Any) -> Any:
    """A logger that keeps the last lines for errors and passes warnings on. Called from several threads.

    One for the process: TensorRT keeps a pointer to the first that it is given, and speaks to that.
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.lines: deque[str] = deque(maxlen=LOG_LINES)

        def log(self, severity: Any, msg: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.WARNING):
                self.lines.append(msg.strip())
            if severity == trt.ILogger.Severity.WARNING:
                log.warning("TensorRT: %s", msg.strip())

    return Logger()
