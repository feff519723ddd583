"""TensorRT's builder: a weightless graph and a weight file -> `engine.plan` and `engine.json`.

Runs in a process of its own, `python -m toolchain.engines.tensorrt_build JOB.json`; `builder_process` starts it and
says what the two tell each other. One path serves TensorRT 10.13 to 11.x: networks are strongly typed, no precision
flag is ever set, and what only some versions have is asked for by name. It is TensorRT's own interface: Polygraphy's
loaders hand over no weights from memory, know neither REFIT_IDENTICAL nor build routes, and join timing caches that do
not belong together.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tensorrt as trt

from toolchain.engines.build_monitor import Monitor
from toolchain.engines.inspector import asked_dtypes, compare_precision, read_layers, require_precision
from toolchain.engines.tensorrt_plan import FORMAT, PLAN
from toolchain.engines.timing_cache import merge_cache, read_cache
from toolchain.errors import DiffbuildError, EngineError, StoreError
from toolchain.files import file_digest
from toolchain.memory import FACTS
from toolchain.weights import MappedWeights

if TYPE_CHECKING:
    import onnx_ir as ir
    from numpy.typing import NDArray

Say = Callable[[dict[str, Any]], None]

GRAPH, WEIGHTS = "graph.onnx", "weights.safetensors"
PR_SET_PDEATHSIG = 1
SEVERITIES = "FEWIV"
"""First letters of trt.ILogger.Severity, from INTERNAL_ERROR (fatal) to VERBOSE."""


def main() -> int:
    """Builds what the job says. Exit code 0 when the engine is there, 1 when the reason was told."""
    job = json.loads(Path(sys.argv[1]).read_text())
    say = _talk()
    _die_with(job["parent"])
    try:
        say({"done": build(job, say, _listen())})
        return 0
    except DiffbuildError as error:
        told = {"where": error.where, "expected": error.expected, "got": error.got}
        say({"error": {"what": error.what, "hint": error.hint} | {k: v and str(v) for k, v in told.items()}})
    except MemoryError:
        say({"error": {"what": "TensorRT's builder ran out of host memory"}})
    except (OSError, RuntimeError) as error:  # a full disk; what pybind makes of C++'s exceptions
        say({"error": {"what": "TensorRT's builder failed", "got": f"{type(error).__name__}: {error}"}})
    return 1


def _talk() -> Say:
    """Takes stdout for the parent alone: what libraries print there goes to stderr, with the log."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    lock = threading.Lock()

    def say(event: dict[str, Any]) -> None:
        with lock:
            out.write(json.dumps(event) + "\n")
            out.flush()

    return say


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when the parent dies, however that happens; and goes if it did already."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def _listen() -> threading.Event:
    """Set by SIGINT. A handler would only run between two bytecodes of the main thread, which is inside TensorRT."""
    cancelled = threading.Event()
    heard, rung = os.pipe()
    os.set_blocking(rung, False)
    signal.set_wakeup_fd(rung)  # written by the interpreter's own handler, in whichever thread the signal arrives
    signal.signal(signal.SIGINT, lambda number, frame: None)

    def wait() -> None:
        os.read(heard, 1)
        cancelled.set()

    threading.Thread(target=wait, daemon=True).start()
    return cancelled


class Logger(trt.ILogger):  # type: ignore[misc]
    """TensorRT's messages on stderr, one line each, without its chatter. Called from several threads."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)

    def log(self, severity: Any, msg: str) -> None:
        if int(severity) < int(trt.ILogger.Severity.VERBOSE):
            sys.stderr.write(f"[{SEVERITIES[int(severity)]}] {msg.rstrip()}\n")


def build(job: Mapping[str, Any], say: Say, cancelled: threading.Event) -> dict[str, Any]:
    """Writes the engine's files into job["out"] and returns what engine.json holds. EngineError, WeightsError."""
    import onnx_ir as ir

    graph, out, options = Path(job["graph"]), Path(job["out"]), job["options"]
    model = ir.load(graph)
    logger = Logger()
    with MappedWeights(Path(job["weights"])) as weights:
        _forecast(weights, options, say)
        plan = _build_plan(job, model, weights, logger, Monitor(say, cancelled), say)
    if plan is None:
        cause = "it was cancelled" if cancelled.is_set() else None
        raise EngineError("TensorRT could not build the engine", where=graph, got=cause)
    (out / PLAN).write_bytes(plan)
    facts = {
        "format": FORMAT,
        "tensorrt": trt.__version__,
        "device": job["device"],
        "options": options,
        "plan_sha256": file_digest(out / PLAN),
        "plan_bytes": plan.nbytes,
        "stripped": options["strip_plan"],
        "refit": _refit(model, graph, out) if options["strip_plan"] else None,
        **_inspect(model, plan, logger, options, graph, say),
    }
    (out / FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def _build_plan(
    job: Mapping[str, Any], model: ir.Model, weights: MappedWeights, logger: Any, monitor: Any, say: Say
) -> memoryview | None:
    options = job["options"]
    builder = _builder(logger)
    network = _create_network(builder)
    with tempfile.TemporaryDirectory(dir=job["out"]) as scratch:
        # TensorRT reads parser and weights while it builds, and nobody but this list keeps them.
        kept = _parse(network, model, job, weights, Path(scratch), logger)
        _decompose_attention(network)
        config = _configure(builder, options)
        _add_profiles(builder, config, model)
        config.progress_monitor = monitor
        cache = _load_timing_cache(config, job["timing_cache"], say)
        plan = builder.build_serialized_network(network, config)
        if plan is not None and cache is not None:
            _save_timing_cache(config, Path(job["timing_cache"]), say)
        del kept
    return None if plan is None else memoryview(plan)


def _builder(logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what the binding makes of the null that a failed start of CUDA gives
        raise EngineError("TensorRT cannot start its builder") from error


def _create_network(builder: Any) -> Any:
    """A strongly typed network: TensorRT 10 needs the flag, 11 knows no other kind."""
    flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    return builder.create_network(0 if flag is None else 1 << int(flag))


def _parse(
    network: Any, model: ir.Model, job: Mapping[str, Any], weights: MappedWeights, scratch: Path, logger: Any
) -> list[Any]:
    """Parses the graph with its weights. Returns what must live until the engine is built."""
    parser, graph = trt.OnnxParser(network, logger), Path(job["graph"])
    buffers = _hand_over(parser, model, graph, weights)
    if buffers is not None:
        parsed = parser.parse_model_proto()
    else:
        parser = trt.OnnxParser(network, logger)
        parsed = parser.parse_from_file(str(_beside_weights(model, Path(job["weights"]), weights, scratch)))
    if not parsed:
        raise _parse_error(parser, graph)
    return [parser, buffers]


def _hand_over(parser: Any, model: ir.Model, graph: Path, weights: MappedWeights) -> list[NDArray[Any]] | None:
    """Gives the parser the weights where they lie, mapped; None where it cannot take them so."""
    import numpy as np

    if not hasattr(parser, "load_initializer") or not parser.load_model_proto(graph.read_bytes()):
        return None
    buffers = []
    for name in _weight_names(model):
        buffers.append(np.require(weights.array(name), requirements=["C", "ALIGNED"]))
        if not parser.load_initializer(name, buffers[-1].ctypes.data, buffers[-1].nbytes):
            return None
    return buffers


def _weight_names(model: ir.Model) -> list[str]:
    from toolchain.graph.placeholder import is_weight

    return sorted(str(name) for name, value in model.graph.initializers.items() if is_weight(value))


def _beside_weights(model: ir.Model, file: Path, weights: MappedWeights, scratch: Path) -> Path:
    """The graph as a file whose external data are a copy of the weight file: paths may not leave the graph's folder."""
    import onnx_ir as ir

    shutil.copyfile(file, scratch / WEIGHTS)
    whole = model.clone()
    for name in _weight_names(whole):
        value, ref = whole.graph.initializers[name], weights.refs[name]
        assert value.const_value is not None
        place = (WEIGHTS, ref.offset, ref.nbytes, value.const_value.dtype)
        value.const_value = ir.ExternalTensor(*place, shape=value.const_value.shape, name=name)  # type: ignore[arg-type]
    ir.save(whole, scratch / GRAPH)
    return scratch / GRAPH


def _parse_error(parser: Any, graph: Path) -> EngineError:
    errors = [parser.get_error(i) for i in range(parser.num_errors)]
    lines = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors]
    unsupported = any("UNSUPPORTED" in str(e.code()) for e in errors)
    return EngineError(
        "TensorRT does not support an operator of the graph" if unsupported else "TensorRT cannot read the graph",
        where=graph,
        got="\n    ".join(dict.fromkeys(lines)) or "no reason given",
        hint=f"this is TensorRT {trt.__version__}; a newer version may know it",
    )


def _decompose_attention(network: Any) -> None:
    """Lets TensorRT take attention apart where no fused kernel fits, rather than fail (NVIDIA/TensorRT issue 4705)."""
    kind = getattr(trt.LayerType, "ATTENTION_INPUT", None)
    for index in range(network.num_layers if kind is not None else 0):
        layer = network.get_layer(index)
        if layer.type == kind:
            layer.__class__ = trt.IAttentionInputLayer
            layer.attention.decomposable = True


def _configure(builder: Any, options: Mapping[str, Any]) -> Any:
    """A builder config from the recipe's options, which the backend found to be this TensorRT's."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector tells types only then
    config.builder_optimization_level = options["builder_optimization_level"]
    for option, kind in (
        ("tiling_optimization_level", trt.TilingOptimizationLevel),
        ("hardware_compatibility_level", trt.HardwareCompatibilityLevel),
    ):
        setattr(config, option, getattr(kind, options[option].upper()))
    if options["workspace_mb"]:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options["workspace_mb"] << 20)
    if options["max_aux_streams"] >= 0:
        config.max_aux_streams = options["max_aux_streams"]
    if not options["tf32"]:
        config.clear_flag(trt.BuilderFlag.TF32)
    if options["strip_plan"]:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if options["build_route"]:
        config.build_route = options["build_route"]
    return config


def _add_profiles(builder: Any, config: Any, model: ir.Model) -> None:
    """A profile for each bucket of a graph with dynamic shapes, at that bucket's shapes alone."""
    from toolchain.graph.profiles import read_profiles

    for number, shapes in enumerate(read_profiles(model)):
        profile = builder.create_optimization_profile()
        for name, shape in shapes.items():
            profile.set_shape(name, shape, shape, shape)
        if number:
            profile.extra_memory_target = 0.0  # no weights in another layout beside those of the first
        if config.add_optimization_profile(profile) < 0:
            raise EngineError("TensorRT does not take the shapes of a bucket", got=shapes)


def _load_timing_cache(config: Any, place: str | None, say: Say) -> Any:
    """Gives the builder what was measured before; a cache that it does not take is left out and later replaced."""
    if place is None:
        return None
    try:
        known = read_cache(Path(place))
    except StoreError as error:
        say({"warning": f"{error.what}: {error.where}"})
        known = b""
    cache = config.create_timing_cache(known)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        say({"warning": f"TensorRT does not take the timing cache {place}; it is measured anew"})
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, place: Path, say: Say) -> None:
    def combine(there: bytes, mine: bytes) -> bytes | None:
        first, second = config.create_timing_cache(there), config.create_timing_cache(mine)
        if first is None or not first.combine(second, ignore_mismatch=False):
            return None
        return bytes(memoryview(first.serialize()))

    try:
        merge_cache(place, bytes(memoryview(config.get_timing_cache().serialize())), combine)
    except StoreError as error:  # an engine is worth more than the time that the next one takes
        say({"warning": f"the timing cache is not kept: {error.what}: {error.where}"})


def _refit(model: ir.Model, graph: Path, out: Path) -> dict[str, Any]:
    """What filling a stripped plan needs beside the weight file: the very graph it was built from, and its weights."""
    shutil.copyfile(graph, out / GRAPH)
    return {"graph": GRAPH, "graph_sha256": file_digest(out / GRAPH), "weights": _weight_names(model)}


def _inspect(
    model: ir.Model, plan: memoryview, logger: Any, options: Mapping[str, Any], graph: Path, say: Say
) -> dict[str, Any]:
    """Opens the plan once: its activation memory, and whether it computes in what the graph asked for."""
    runtime = trt.Runtime(logger)
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise EngineError("TensorRT cannot open the engine that it built", where=graph)
    try:
        layers = [
            layer for text in _descriptions(engine, model) for layer in read_layers(json.loads(text, strict=False))
        ]
    except (ValueError, RuntimeError) as error:  # an engine is worth more than its description
        say({"warning": f"TensorRT's inspector cannot be asked, or what it says is not JSON ({error})"})
        layers = []
    precision = compare_precision(asked_dtypes(model), layers)
    require_precision(precision, graph)
    if precision.asked and (not precision.named or precision.opaque):
        say({"warning": "TensorRT's inspector tells no types of the graph's nodes; the precision is not verified"})
    return {"activation_bytes": int(engine.device_memory_size_v2), "precision": precision.to_json()}


def _descriptions(engine: Any, model: ir.Model) -> Iterator[str]:
    """The inspector's words, profile by profile: of a dynamic shape it tells the type once a context has fixed it."""
    from toolchain.graph.profiles import read_profiles

    inspector = engine.create_engine_inspector()
    for number, shapes in enumerate(read_profiles(model) or [{}]):
        if shapes:
            context = engine.create_execution_context(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
            if context is None or not context.set_optimization_profile_async(number, 0):
                raise ValueError(f"it has no context for profile {number}")
            if not all(context.set_input_shape(name, shape) for name, shape in shapes.items()):
                raise ValueError(f"it does not take the shapes of profile {number}")
            inspector.execution_context = context
        yield inspector.get_engine_information(trt.LayerInformationFormat.JSON)


def _forecast(weights: MappedWeights, options: Mapping[str, Any], say: Say) -> None:
    from toolchain.engines.cuda import free_memory_bytes
    from toolchain.engines.forecast import build_warning

    try:
        free = free_memory_bytes()
    except EngineError:
        return  # TensorRT meets the same fault, and its words are explained
    warning = build_warning(sum(ref.nbytes for ref in weights.refs.values()), options, free)
    if warning:
        say({"warning": warning})


if __name__ == "__main__":
    sys.exit(main())
