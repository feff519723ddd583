"""TensorRT's builder: a weightless graph and a weight file -> `engine.plan` and `engine.json`.

Runs in a process of its own, `python -m toolchain.engines.tensorrt.build_plan JOB.json`; `builder_process` starts it
and says what the two tell each other. One path serves TensorRT 10.13 to 11.x and TensorRT for RTX: networks are
strongly typed, no precision flag is ever set, and what only some versions have is asked for by name. It is TensorRT's
own interface: Polygraphy's loaders hand over no weights from memory, know neither REFIT_IDENTICAL nor build routes,
and join timing caches that do not belong together.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.engines.tensorrt.build_memory import build_warning, free_host_bytes, host_build_warning
from toolchain.engines.tensorrt.build_monitor import Say, make_logger, make_monitor
from toolchain.engines.tensorrt.build_summary import report
from toolchain.engines.tensorrt.layout import FORMAT, GRAPH, PLAN
from toolchain.engines.tensorrt.library import LIBRARIES_BY_BACKEND
from toolchain.engines.tensorrt.network import (
    add_profiles,
    create_network,
    decompose_attention,
    parse,
    weight_names,
)
from toolchain.engines.tensorrt.plan_file import make_plan_file
from toolchain.engines.tensorrt.rtx_targets import chosen_targets, set_targets
from toolchain.engines.tensorrt.timing_cache import merge_cache, read_cache
from toolchain.errors import DiffbuildError, EngineError, StoreError
from toolchain.recipe.options import TensorRtOptions, TensorRtRtxOptions
from toolchain.store.facts import ENGINE_FACTS
from toolchain.store.files import file_digest
from toolchain.weights.mapped import MappedWeights

if TYPE_CHECKING:
    import onnx_ir as ir

PR_SET_PDEATHSIG = 1
Options = TensorRtOptions | TensorRtRtxOptions


def main() -> int:
    """Runs the job in the file that the command line names. Exit code 0 when the engine is built, 1 when an error was
    reported."""
    job = json.loads(Path(sys.argv[1]).read_text())
    say = _talk()
    _die_with(job["parent"])
    try:
        say({"done": build(job, say, _listen())})
        return 0
    except DiffbuildError as error:
        details = {"where": error.where, "expected": error.expected, "got": error.got}
        say({"error": {"what": error.what, "hint": error.hint} | {k: v and str(v) for k, v in details.items()}})
    except MemoryError:
        say({"error": {"what": "TensorRT's builder ran out of memory", "got": "out of host memory"}})
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


def build(job: Mapping[str, Any], say: Say, cancelled: threading.Event) -> dict[str, Any]:
    """Writes the engine's files into job["out"] and returns what engine.json holds. EngineError, WeightsError."""
    import onnx_ir as ir

    library = LIBRARIES_BY_BACKEND[job["backend"]]
    graph, out, options = Path(job["graph"]), Path(job["out"]), read_options(job)
    stripped = isinstance(options, TensorRtOptions) and options.strip_plan
    trt, model = library.module(), ir.load(graph)
    logger = make_logger(trt)
    digest = None
    try:
        with MappedWeights(Path(job["weights"])) as weights:
            _warn_of_memory(weights, options, say)
            monitor = make_monitor(trt, say, cancelled, weights.release_pages)
            digest = _build_plan(trt, job, model, weights, logger, monitor, say)
    finally:
        if digest is None:
            (out / PLAN).unlink(missing_ok=True)
    if digest is None:
        cause = "it was cancelled" if cancelled.is_set() else None
        raise EngineError("TensorRT could not build the engine", where=graph, got=cause)
    facts = {
        "format": FORMAT,
        library.backend: trt.__version__,
        "device": job["device"],
        "options": job["options"],
        "plan_sha256": digest,
        "plan_bytes": (out / PLAN).stat().st_size,
        "stripped": stripped,
        "refit": _refit(model, graph, out) if stripped else None,
        **report(library, model, out / PLAN, logger, graph, say),
    }
    (out / ENGINE_FACTS).write_text(json.dumps(facts, indent=1) + "\n")
    return facts


def read_options(job: Mapping[str, Any]) -> Options:
    """The backend's options in a job, which leaves out those that only matter when an engine runs."""
    given: dict[str, Any] = {name: tuple(v) if isinstance(v, list) else v for name, v in job["options"].items()}
    return TensorRtRtxOptions(**given) if job["backend"] == "tensorrt_rtx" else TensorRtOptions(**given)


def _build_plan(
    trt: Any, job: Mapping[str, Any], model: ir.Model, weights: MappedWeights, logger: Any, monitor: Any, say: Say
) -> str | None:
    """Writes the plan and returns its sha256; None where TensorRT gives none."""
    graph, out, options = Path(job["graph"]), Path(job["out"]), read_options(job)
    builder = _builder(trt, logger)
    network = create_network(trt, builder)
    with tempfile.TemporaryDirectory(dir=out) as scratch, (out / PLAN).open("xb") as file:
        # TensorRT reads parser and weights while it builds, and nobody but this list keeps them.
        kept = parse(trt, network, model, graph, Path(job["weights"]), weights, Path(scratch), logger)
        decompose_attention(trt, network)
        config = _configure(trt, builder, options)
        if isinstance(options, TensorRtRtxOptions):
            set_targets(trt, config, chosen_targets(model, options.targets))
        add_profiles(builder, config, model)
        config.progress_monitor = monitor
        cache = _load_timing_cache(config, job["timing_cache"], say)
        plan = make_plan_file(trt, file)
        built = builder.build_serialized_network_to_stream(network, config, plan)
        plan.require_written()
        if built and cache is not None:
            _save_timing_cache(config, Path(job["timing_cache"]), say)
        del kept
    return plan.digest if built else None


def _builder(trt: Any, logger: Any) -> Any:
    try:
        return trt.Builder(logger)
    except TypeError as error:  # what the binding makes of the null that a failed start of CUDA gives
        raise EngineError("TensorRT cannot start its builder") from error


def _configure(trt: Any, builder: Any, options: Options) -> Any:
    """A builder config from the options of this library."""
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the inspector tells types only then
    if not options.tf32:
        config.clear_flag(trt.BuilderFlag.TF32)
    own_memory = getattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION", None)
    if own_memory is not None:  # TensorRT for RTX: an engine that allocates in its runs cannot be captured
        config.set_flag(own_memory)
    if isinstance(options, TensorRtOptions):
        _configure_search(trt, config, options)
    return config


def _configure_search(trt: Any, config: Any, options: TensorRtOptions) -> None:
    """What TensorRT alone has: how it looks for kernels on the GPU at hand, and what it leaves out of a plan."""
    config.builder_optimization_level = options.builder_optimization_level
    for option, kind in (
        ("tiling_optimization_level", trt.TilingOptimizationLevel),
        ("hardware_compatibility_level", trt.HardwareCompatibilityLevel),
    ):
        setattr(config, option, getattr(kind, getattr(options, option).upper()))
    if options.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mb << 20)
    if options.max_aux_streams >= 0:
        config.max_aux_streams = options.max_aux_streams
    if options.strip_plan:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if options.build_route:
        config.build_route = options.build_route


def _load_timing_cache(config: Any, path: str | None, say: Say) -> Any:
    """Gives the builder what was measured before; a cache that it does not take is left out and later replaced."""
    if path is None:
        return None
    try:
        known = read_cache(Path(path))
    except StoreError as error:
        say({"warning": f"{error.what}: {error.where}"})
        known = b""
    cache, empty = config.create_timing_cache(known), config.create_timing_cache(b"")
    # Of one that is damaged TensorRT makes an empty one, or none, by its version; another GPU's it does not set.
    lost = known and (cache is None or bytes(memoryview(cache.serialize())) == bytes(memoryview(empty.serialize())))
    if lost or not config.set_timing_cache(cache, ignore_mismatch=False):
        say({"warning": f"TensorRT does not take the timing cache {path}; it is measured anew"})
        cache = empty
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _save_timing_cache(config: Any, path: Path, say: Say) -> None:
    def combine(saved: bytes, measured: bytes) -> bytes | None:
        first, second = config.create_timing_cache(saved), config.create_timing_cache(measured)
        if first is None or not first.combine(second, ignore_mismatch=False):
            return None
        return bytes(memoryview(first.serialize()))

    try:
        merge_cache(path, bytes(memoryview(config.get_timing_cache().serialize())), combine)
    except StoreError as error:  # an engine is worth more than the time that the next one takes
        say({"warning": f"the timing cache is not kept: {error.what}: {error.where}"})


def _refit(model: ir.Model, graph: Path, out: Path) -> dict[str, Any]:
    """What filling a stripped plan needs beside the weight file: the very graph it was built from, and its weights."""
    shutil.copyfile(graph, out / GRAPH)
    return {"graph": GRAPH, "graph_sha256": file_digest(out / GRAPH), "weights": weight_names(model)}


def _warn_of_memory(weights: MappedWeights, options: Options, say: Say) -> None:
    """Warns where the memory that the builder needs is not free: the GPU's, or the host's where it needs no GPU."""
    nbytes = sum(ref.nbytes for ref in weights.refs.values())
    if isinstance(options, TensorRtRtxOptions):
        warning = host_build_warning(nbytes, free_host_bytes())
    else:
        from toolchain.cuda.driver import free_memory_bytes

        try:
            warning = build_warning(nbytes, options, free_memory_bytes())
        except EngineError:
            return  # TensorRT meets the same fault, and its words are explained
    if warning:
        say({"warning": warning})


if __name__ == "__main__":
    sys.exit(main())
