"""A plan of TensorRT, opened: `engine.plan` and `engine.json` in a folder -> a deserialised engine with its weights.

A plan is machine code: only bundles that are trusted as programs are, and whose sha256 was verified, get here.
TensorRT may not run code for the host that a plan contains, and no recipe can ask for such a plan: one for later
versions of TensorRT would hold a runtime of its own.
"""

from __future__ import annotations

import json
import logging
import mmap
from collections import deque
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.cuda.capacity import FEWER_BUCKETS
from toolchain.cuda.driver import ALLOCATION, device_facts
from toolchain.engines.tensorrt.layout import FORMAT, PLAN
from toolchain.engines.tensorrt.library import OUT_OF_MEMORY, Library
from toolchain.engines.tensorrt.rtx_runtime import ask_validity, runtime_config
from toolchain.engines.tensorrt.runtime_cache import RuntimeCache
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.store.facts import ENGINE_FACTS
from toolchain.weights.mapped import MappedWeights

log = logging.getLogger("toolchain")

REBUILD = "build it again, from the same recipe"
LOG_LINES = 8
NUMPY_DTYPES = {
    "FLOAT": "float32", "HALF": "float16", "BF16": "bfloat16", "INT8": "int8", "UINT8": "uint8", "INT32": "int32",
    "INT64": "int64", "BOOL": "bool",
}  # fmt: skip
"""TensorRT's name of a type -> numpy's; trt.nptype raises for bfloat16."""


def read_facts(folder: Path) -> dict[str, Any]:
    """The facts in engine.json. EngineError when it cannot be read or is of another format."""
    path = folder / ENGINE_FACTS
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


class OpenPlan:
    """A plan with one optimization profile, or with one for each bucket; the engines of all buckets share it then."""

    def __init__(
        self, library: Library, folder: Path, weights: Mapping[str, Path], kernel_specialization: str = "eager"
    ) -> None:
        """Raises EngineError. kernel_specialization: see the options of a library whose engines are finished here."""
        self.folder = folder
        self.users = 0
        facts = read_facts(folder)
        self._library = library
        self._trt = library.module()
        self._log = _logger(self._trt)
        self._log.lines.clear()  # older messages are not about this plan
        self._runtime: Any = None
        self.engine: Any = None
        self._config: Any = None
        self._kernels: RuntimeCache | None = None
        try:
            self._runtime = self._start()
            self.engine = self._deserialize(facts)
            if facts["stripped"]:
                self._refit(facts["refit"], weights["weights"])
            if library.portable:
                self._finish_here(facts, kernel_specialization)
        except BaseException:
            self.close()
            raise

    @property
    def profiles(self) -> int:
        """How many optimization profiles it has, one for each bucket."""
        return int(self.engine.num_optimization_profiles)

    def profile_of(self, spec: GraphSpec) -> int:
        """The number of the profile for just these shapes. EngineError for an engine of another signature."""
        expected = {_described(t, "input") for t in spec.inputs} | {_described(t, "output") for t in spec.outputs}
        signatures = [self._signature(profile, spec) for profile in range(self.profiles)]
        if expected not in signatures:
            raise EngineError(
                "the engine has other inputs or outputs than its manifest says",
                where=self.folder,
                expected=sorted(expected - signatures[0]),
                got=sorted(signatures[0] - expected),
                hint=REBUILD,
            )
        return signatures.index(expected)

    def context(self) -> Any:
        """A new execution context without memory of its own, or None: the log says why."""
        if self._config is not None:
            return self.engine.create_execution_context(self._config)
        return self.engine.create_execution_context(self._trt.ExecutionContextAllocationStrategy.USER_MANAGED)

    def keep_kernels(self) -> None:
        """Saves kernels that were finished on this GPU since the last time, for the next process that opens it."""
        if self._kernels is not None:
            self._kernels.save()

    def close(self) -> None:
        """Frees the engine. Its contexts must be freed before."""
        with ALLOCATION:
            self._kernels = self._config = None
            self.engine = None  # after its contexts and before its runtime
            self._runtime = None

    def failure(self, what: str, details: Sequence[str] = (), hint: str | None = None) -> EngineError:
        """An error that says what TensorRT logged last, and what helps where that is a lack of memory."""
        lines = [*details, *self._log.lines.copy()]  # TensorRT's threads may still be writing
        if any(OUT_OF_MEMORY.search(line) for line in lines):
            hint = FEWER_BUCKETS
        return EngineError(what, where=self.folder, got="\n    ".join(lines) or "no reason given", hint=hint)

    def _start(self) -> Any:
        try:
            return self._trt.Runtime(self._log)
        except TypeError as error:  # what the binding makes of the null that a failed start of CUDA gives
            raise self.failure("TensorRT cannot start its runtime") from error

    def _deserialize(self, facts: Mapping[str, Any]) -> Any:
        path = self.folder / PLAN
        try:
            with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as plan:
                if len(plan) != facts["plan_bytes"]:
                    raise ValueError(f"{len(plan)} bytes where {ENGINE_FACTS} says {facts['plan_bytes']}")
                if self._library.portable:
                    self._require_valid(plan)
                engine = self._runtime.deserialize_cuda_engine(plan)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped: ValueError
            raise EngineError("an engine's plan cannot be read", where=path, got=error, hint=REBUILD) from error
        if engine is None:
            raise self.failure("TensorRT cannot open the engine", hint=REBUILD)
        return engine

    def _require_valid(self, plan: mmap.mmap) -> None:
        """EngineError for a plan that the library says it cannot run on this GPU; a warning where it will be slow."""
        validity, why = ask_validity(self._trt, self._runtime, plan)
        if validity == "invalid":
            raise self.failure(f"{self._library.title} cannot run the engine on this GPU", [why], REBUILD)
        if validity == "suboptimal":
            log.warning("%s: the engine is not the best for this GPU: %s", self.folder, why)

    def _finish_here(self, facts: Mapping[str, Any], kernel_specialization: str) -> None:
        """Kernels are finished on this GPU, but for those of the last time."""
        here, library = device_facts(), {self._library.backend: str(self._trt.__version__)}
        tied = {name: str(here[name]) for name in ("name", "compute_capability", "driver")}
        self._config = runtime_config(self._trt, self.engine, kernel_specialization)
        self._kernels = RuntimeCache(self._config, {"plan": str(facts["plan_sha256"]), **tied, **library})

    def _refit(self, recipe: Mapping[str, Any], file: Path) -> None:
        """Fills a stripped plan from the component's weight file, through the graph that it was built from."""
        trt = self._trt
        try:
            refitter = trt.Refitter(self.engine, self._log)
        except TypeError as error:
            raise self.failure("TensorRT cannot fill the engine with its weights", hint=REBUILD) from error
        parser = trt.OnnxParserRefitter(refitter, self._log)
        graph = _read(self.folder / recipe["graph"])
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
                raise self.failure("TensorRT cannot fill the engine with its weights", [*errors, *lacking], REBUILD)

    def _signature(self, profile: int, spec: GraphSpec) -> set[str]:
        """The engine's tensors under a profile. What is dynamic of an output is taken to be as in `spec`."""
        trt, engine, tensors = self._trt, self.engine, set()
        outputs = {t.name: t.shape for t in spec.outputs}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            side = engine.get_tensor_mode(name).name.lower()
            shape = tuple(engine.get_tensor_shape(name))
            if -1 in shape and side == "input":
                least, _, most = (tuple(s) for s in engine.get_tensor_profile_shape(name, profile))
                shape = least if least == most else shape
            elif len(shape) == len(outputs.get(name, ())):
                shape = tuple(there if size == -1 else size for size, there in zip(shape, outputs[name], strict=True))
            dtype = engine.get_tensor_dtype(name).name
            dtype = NUMPY_DTYPES.get(dtype, dtype)
            if engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
                dtype = f"host {dtype}"
            tensors.add(_described(TensorSpec(name, dtype, shape), side))
        return tensors


def _described(tensor: TensorSpec, side: str) -> str:
    return f"{side} {tensor.name}: {tensor.dtype} {list(tensor.shape)}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise EngineError("a file of an engine cannot be read", where=path, got=error, hint=REBUILD) from error


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
