"""`diffbuild trace`: one generation on a timeline, as Chrome's trace events, which Perfetto opens.

The recorder is an observer of the pipeline. Its times are marks in the pipeline's memory, which are events on a GPU.
"""

from __future__ import annotations

import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.bundle.bundle import Bundle
from toolchain.engines.buffers import HostMemory, Memory
from toolchain.errors import UsageError
from toolchain.runtime.observer import Observer
from toolchain.runtime.pipeline import Pipeline
from toolchain.runtime.result import Result
from toolchain.trace.operators import Launch
from toolchain.trace.profiler import Profiler
from toolchain.trace.timeline import Span, Trace

PROFILED = "onnxruntime"


def trace(bundle: Bundle, request: Mapping[str, Any], *, operators: bool = False) -> Trace:
    """Draws one picture twice and records the second time: the first opens and warms up what it needs.

    request    what a pipeline is called with
    operators  profile the engines as well, which makes each operator some microseconds slower

    Raises UsageError for operators of another backend than ONNX Runtime on the CPU, and what a pipeline raises.
    """
    if operators and bundle.backend != PROFILED:
        raise UsageError(
            "operators are profiled only for engines that ONNX Runtime runs on the CPU",
            where=bundle.path,
            got=bundle.backend,
            hint="on a GPU: nsys profile diffbuild trace ..., which shows kernels below the ranges of each engine",
        )
    with tempfile.TemporaryDirectory(prefix="diffbuild-trace-") as scratch:
        profiler = Profiler(bundle, Path(scratch)) if operators else None
        recorder = _Recorder()
        pipe = Pipeline(bundle, warm_up=False, open_buckets=1, observer=recorder, backend=profiler)
        recorder.attach(pipe.memory)
        try:
            pipe(**request, callback=lambda progress: False)  # one evaluation is enough of a warm-up
            pipe.forget_prompts()
            with recorder.recording():
                result = pipe(**request)
            profiles = profiler.launches() if profiler else {}
            return _trace(bundle, result, recorder, profiles)
        finally:
            pipe.close()


@dataclass(frozen=True)
class _Scope:
    """A stage, step or engine call. `marks` are the memory's, `host` seconds of the host's clock."""

    kind: str
    name: str
    marks: tuple[Any, Any]
    host: tuple[float, float]
    about: Mapping[str, Any] = field(default_factory=dict)
    number: int = 0
    """Of an engine's launches, counted from its opening on."""


class _Recorder(Observer):
    """Notes begin and end of everything inside `recording`."""

    def __init__(self) -> None:
        self.scopes: list[_Scope] = []
        self.nvtx: str | None = None
        self._range: Callable[[str], AbstractContextManager[Any]] = nullcontext
        self._launches: Counter[str] = Counter()
        self._on = False

    def attach(self, memory: Memory) -> None:
        """Takes the memory whose marks are the times."""
        self.memory = memory
        self.on_host = isinstance(memory, HostMemory)
        if not self.on_host:
            self._range, self.nvtx = _nvtx()

    @contextmanager
    def recording(self) -> Iterator[None]:
        """What happens inside is recorded as one generation."""
        self.zero_s, self.zero, self._on = time.perf_counter(), self.memory.mark(), True
        yield
        self.end_s, self._on = time.perf_counter(), False
        self.memory.read()  # every mark lies before it

    def stage(self, name: str) -> AbstractContextManager[None]:
        """Observes a stage."""
        return self._scope("stage", name)

    def evaluation(self, index: int, total: int, timestep: float) -> AbstractContextManager[None]:
        """Observes an evaluation."""
        return self._scope("step", f"evaluation {index + 1} of {total}", {"timestep": timestep})

    @contextmanager
    def engine(self, name: str) -> Iterator[None]:
        """Observes a launch, which on a GPU gets an NVTX range."""
        number = self._launches[name]
        self._launches[name] += 1
        with self._range(name), self._scope("engine", name, number=number):
            yield

    @contextmanager
    def _scope(self, kind: str, name: str, about: Mapping[str, Any] | None = None, number: int = 0) -> Iterator[None]:
        if not self._on:
            yield
            return
        first, began = self.memory.mark(), time.perf_counter()
        yield
        ended, last = time.perf_counter(), self.memory.mark()
        self.scopes.append(_Scope(kind, name, (first, last), (began, ended), about or {}, number))

    def between(self, scope: _Scope) -> tuple[float, float]:
        """(start, end) of a scope in milliseconds of the memory's work."""
        first, last = (self.memory.elapsed_ms(self.zero, mark) for mark in scope.marks)
        return first, last


def _trace(bundle: Bundle, result: Result, recorder: _Recorder, profiles: Mapping[str, Sequence[Launch]]) -> Trace:
    calls = [scope for scope in recorder.scopes if scope.kind == "engine"]
    spans = [*_spans(recorder), *_operators(recorder, calls, profiles)]
    launches = {
        name: tuple(profile[call.number] for call in calls if call.name == name) for name, profile in profiles.items()
    }
    request = result.request
    about = {"prompt": request.prompts[0], "seed": request.seeds[0], "scheduler": request.scheduler}
    return Trace(
        name=f"{bundle.recipe.name} ({bundle.backend})",
        about={**about, "steps": request.steps, "size": f"{request.size[0]}x{request.size[1]}"},
        spans=tuple(sorted(spans, key=lambda s: (s.track, s.when_ms[0], -s.when_ms[1]))),
        launches={name: recorded for name, recorded in launches.items() if recorded},
        nvtx=recorder.nvtx,
    )


def _spans(recorder: _Recorder) -> Iterator[Span]:
    """Stages, evaluations and engine calls in the memory's time. What only the host knows lies beside them on a CPU, on
    a track of its own where the memory is a GPU's."""
    track = "pipeline" if recorder.on_host else "host"

    def since(start: float, end: float) -> tuple[float, float]:
        return (start - recorder.zero_s) * 1e3, (end - recorder.zero_s) * 1e3

    yield Span("generation", "generation", since(recorder.zero_s, recorder.end_s), track=track)
    for scope in recorder.scopes:
        if scope.name == "tokenize":
            yield Span("tokenize", "stage", since(*scope.host), track=track)
            continue
        yield Span(scope.name, scope.kind, recorder.between(scope), scope.about)
        if scope.kind == "engine" and not recorder.on_host:
            yield Span(f"launch {scope.name}", "launch", since(*scope.host), track=track)


def _operators(
    recorder: _Recorder, calls: Sequence[_Scope], profiles: Mapping[str, Sequence[Launch]]
) -> Iterator[Span]:
    for call in calls:
        if call.name not in profiles:
            continue
        launch = profiles[call.name][call.number]
        start, end = recorder.between(call)
        # The profiler's clock is its own. What lies around its launch in ours is Python's, half before, half after.
        start += max((end - start) - launch.duration_us / 1e3, 0.0) / 2
        for o in launch.operators:
            when = (min(start + o.start_us / 1e3, end), min(start + o.end_us / 1e3, end))
            about = {"operator": o.name, "shapes": o.shapes, "engine": call.name}
            yield Span(o.kind, "operator", when, about, track="operators")


def _nvtx() -> tuple[Callable[[str], AbstractContextManager[Any]], str]:
    """What makes a range, and what to say of it."""
    try:
        import nvtx
    except ImportError:
        return nullcontext, "no NVTX ranges: pip install nvtx"
    return nvtx.annotate, "NVTX ranges around every launch"
