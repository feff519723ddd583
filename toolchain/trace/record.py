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
from toolchain.trace.profiler import PROFILERS, Call, Profiler
from toolchain.trace.timeline import Span, Trace


def trace(bundle: Bundle, request: Mapping[str, Any], *, operators: bool = False) -> Trace:
    """Draws one picture twice and records the second time: the first opens and warms up what it needs.

    request    what a pipeline is called with
    operators  profile the engines as well, which makes each operator some microseconds slower

    Raises UsageError for operators of engines that do not run on the CPU, and what a pipeline raises.
    """
    with tempfile.TemporaryDirectory(prefix="diffbuild-trace-") as scratch:
        profiler = _profiler(bundle, Path(scratch)) if operators else None
        recorder = _Recorder()
        pipe = Pipeline(bundle, warm_up=False, open_buckets=1, observer=recorder, backend=profiler)
        recorder.attach(pipe.memory)
        try:
            pipe(**request, callback=lambda progress: False)  # one evaluation is enough of a warm-up
            pipe.forget_prompts()
            if profiler is not None:
                profiler.begin()
            with recorder.recording():
                result = pipe(**request)
            profiles = profiler.launches(recorder.calls()) if profiler is not None else {}
            return _trace(bundle, result, recorder, profiles)
        finally:
            pipe.close()


def _profiler(bundle: Bundle, scratch: Path) -> Profiler:
    """What opens a bundle's engines with a profile. Raises UsageError for engines of another device than the CPU."""
    device = bundle.recipe.openvino.device if bundle.backend == "openvino" else "CPU"
    if bundle.backend not in PROFILERS or device != "CPU":
        hint = "on an NVIDIA GPU: nsys profile diffbuild trace ..., which shows kernels below each engine's ranges"
        raise UsageError(
            "operators are profiled only for engines that run on the CPU",
            where=bundle.path,
            expected=f"a bundle of {' or '.join(PROFILERS)}",
            got=bundle.backend + (f' with device = "{device}"' if device != "CPU" else ""),
            hint=None if bundle.backend in PROFILERS else hint,
        )
    return PROFILERS[bundle.backend](bundle, scratch)


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

    def calls(self) -> dict[str, list[Call]]:
        """Engine -> its launches that were recorded."""
        calls: dict[str, list[Call]] = {}
        for scope in self.scopes:
            if scope.kind == "engine":
                start, end = self.between(scope)
                calls.setdefault(scope.name, []).append(Call(scope.number, (end - start) * 1e3))
        return calls


def _trace(bundle: Bundle, result: Result, recorder: _Recorder, profiles: Mapping[str, Sequence[Launch]]) -> Trace:
    spans = [*_spans(recorder), *_operators(recorder, profiles)]
    request = result.request
    about = {"prompt": request.prompts[0], "seed": request.seeds[0], "scheduler": request.scheduler}
    return Trace(
        name=f"{bundle.recipe.name} ({bundle.backend})",
        about={**about, "steps": request.steps, "size": f"{request.size[0]}x{request.size[1]}"},
        spans=tuple(sorted(spans, key=lambda s: (s.track, s.when_ms[0], -s.when_ms[1]))),
        launches={name: tuple(launches) for name, launches in profiles.items()},
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


def _operators(recorder: _Recorder, profiles: Mapping[str, Sequence[Launch]]) -> Iterator[Span]:
    waiting = {name: iter(launches) for name, launches in profiles.items()}
    for call in (scope for scope in recorder.scopes if scope.kind == "engine" and waiting):
        launch = next(waiting[call.name])
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
