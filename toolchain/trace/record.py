"""`diffbuild trace`: one generation on a timeline, as Chrome's trace events, which Perfetto opens.

The runtime knows nothing of it. While a generation is recorded, what the backend opens, what a run adds to its timings
and the tokenizers are wrapped; times are the marks that the runtime's memory makes, on a GPU those of its stream.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.engines.backend import Buffers, Engine
from toolchain.engines.buffers import HostMemory, Memory
from toolchain.engines.registry import backend_of
from toolchain.errors import UsageError
from toolchain.runtime.pipeline import Pipeline
from toolchain.runtime.prompt import PromptTokenizer
from toolchain.runtime.result import Result, Timings
from toolchain.signature import GraphSpec
from toolchain.trace.operators import Launch, read_profile
from toolchain.trace.timeline import Span, Trace
from toolchain.wrapping import wrapped

STAGES = ("text", "upload", "denoise", "decode")
"""Between the marks that a run hands to `Timings.add`; upload is drawing the noise, encoding an image and uploading."""
PROFILED = "onnxruntime"


def trace(bundle: Bundle, request: Mapping[str, Any], *, operators: bool = False) -> Trace:
    """Draws one picture twice and records the second time: the first opens and warms up what it needs.

    request    what a pipeline is called with
    operators  profile the engines as well, which makes each operator some microseconds slower

    Raises UsageError for operators of another backend than ONNX Runtime on the CPU, and what a pipeline raises.
    """
    if operators and bundle.backend != PROFILED:
        raise UsageError(
            "operators are only told of engines that ONNX Runtime runs on the CPU",
            where=bundle.path,
            got=bundle.backend,
            hint="on a GPU: nsys profile diffbuild trace ..., which shows kernels below the ranges of each engine",
        )
    with tempfile.TemporaryDirectory(prefix="diffbuild-trace-") as scratch:
        recorder = _Recorder(bundle, Path(scratch) if operators else None)
        with recorder.attached():
            pipe = Pipeline(bundle, warm_up=False, open_buckets=1)
            try:
                pipe(**request, callback=lambda progress: False)  # one evaluation is enough of a warm-up
                pipe.forget_prompts()
                with recorder.recording():
                    # With a callback there is a mark after each evaluation, also where a GPU could run all as one.
                    result = pipe(**request, callback=lambda progress: None)
                return recorder.trace(result)
            finally:
                pipe.close()


@dataclass(frozen=True)
class _Call:
    """A launch; `number` counts those of its engine from its opening on. `marks` are the memory's, `host` seconds."""

    engine: str
    number: int
    marks: tuple[Any, Any]
    host: tuple[float, float]


@dataclass
class _Recorder:
    bundle: Bundle
    profiles: Path | None
    calls: list[_Call] = field(default_factory=list)
    runs: list[tuple[list[Any], list[Any]]] = field(default_factory=list)
    tokenized: list[tuple[float, float]] = field(default_factory=list)
    engines: dict[str, _Engine] = field(default_factory=dict)
    memory: Memory | None = None
    on: bool = False

    @contextmanager
    def attached(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(wrapped(backend_of(self.bundle.backend), "open", self._open))
            stack.enter_context(wrapped(PromptTokenizer, "encode", self._encode))
            stack.enter_context(wrapped(Timings, "add", self._add))
            yield

    @contextmanager
    def recording(self) -> Iterator[None]:
        assert self.memory is not None
        self.zero_s, self.zero, self.on = time.perf_counter(), self.memory.mark(), True
        yield
        self.end_s, self.on = time.perf_counter(), False

    def _open(
        self,
        plain: Callable[..., Engine],
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: Mapping[str, Any],
        memory: Memory,
    ) -> Engine:
        name = next(
            component if bucket == ANY else f"{component} {bucket}"
            for component, entries in self.bundle.engines.items()
            for bucket, entry in entries.items()
            if self.bundle.path / entry.folder == folder and entry.spec == spec  # buckets may share an engine
        )
        self.memory = memory
        profile = {"profile": str(self.profiles / name.replace(" ", "-"))} if self.profiles else {}
        self.engines[name] = _Engine(plain(folder, weights, spec, {**options, **profile}, memory), name, self)
        return self.engines[name]

    def _encode(self, plain: Callable[..., Any], *args: Any) -> Any:
        started = time.perf_counter()
        encoded = plain(*args)
        if self.on:
            self.tokenized.append((started, time.perf_counter()))
        return encoded

    def _add(self, plain: Callable[..., None], timings: Timings, memory: Memory, marks: Any, evaluated: Any) -> None:
        if self.on:
            self.runs.append((list(marks), list(evaluated)))
        plain(timings, memory, marks, evaluated)

    def trace(self, result: Result) -> Trace:
        """Of what was recorded; the engines and their memory must still be open, and no more is profiled."""
        profiles = {n: read_profile(e.end_profile()) for n, e in self.engines.items()} if self.profiles else {}
        spans = [*self._pipeline(result), *self._host(result), *self._operators(profiles)]
        calls = {name: [c for c in self.calls if c.engine == name] for name in self.engines}
        launches = {n: tuple(profiles[n][c.number] for c in calls[n]) for n in profiles if calls[n]}
        request = result.request
        about = {"prompt": request.prompts[0], "seed": request.seeds[0], "scheduler": request.scheduler}
        return Trace(
            name=f"{self.bundle.recipe.name} ({self.bundle.backend})",
            about={**about, "steps": request.steps, "size": f"{request.size[0]}x{request.size[1]}"},
            spans=tuple(sorted(spans, key=lambda s: (s.track, s.when_ms[0], -s.when_ms[1]))),
            launches=launches,
            nvtx=None if self._on_host else _nvtx()[1],
        )

    @property
    def _on_host(self) -> bool:
        return isinstance(self.memory, HostMemory)

    def _between(self, marks: tuple[Any, Any]) -> tuple[float, float]:
        assert self.memory is not None
        first, last = (self.memory.elapsed_ms(self.zero, mark) for mark in marks)
        return first, last

    def _pipeline(self, result: Result) -> Iterator[Span]:
        """Stages, evaluations and engine calls."""
        for marks, evaluated in self.runs:
            for stage, ends in zip(STAGES, itertools.pairwise(marks), strict=True):
                yield Span(stage, "stage", self._between(ends))
            for index, ends in enumerate(itertools.pairwise([marks[2], *evaluated])):
                timestep = {"timestep": float(result.table.timesteps[index])}
                name = f"evaluation {index + 1} of {result.table.evaluations}"
                yield Span(name, "step", self._between(ends), timestep)
        for call in self.calls:
            yield Span(call.engine, "engine", self._between(call.marks))

    def _host(self, result: Result) -> Iterator[Span]:
        """What only the host knows: beside the pipeline on a CPU, on a track of its own where that is a GPU's."""
        track = "pipeline" if self._on_host else "host"

        def since(start: float, end: float) -> tuple[float, float]:
            return (start - self.zero_s) * 1e3, (end - self.zero_s) * 1e3

        yield Span("generation", "generation", since(self.zero_s, self.end_s), track=track)
        for tokenized in self.tokenized:
            yield Span("tokenize", "stage", since(*tokenized), track=track)
        if not self._on_host:
            for call in self.calls:
                yield Span(f"launch {call.engine}", "launch", since(*call.host), track=track)

    def _operators(self, profiles: Mapping[str, list[Launch]]) -> Iterator[Span]:
        for call in self.calls:
            if call.engine not in profiles:
                continue
            launch = profiles[call.engine][call.number]
            start, end = self._between(call.marks)
            # The profiler's clock is its own. What lies around its launch in ours is Python's, half before, half after.
            start += max((end - start) - launch.duration_us / 1e3, 0.0) / 2
            for o in launch.operators:
                when = (min(start + o.start_us / 1e3, end), min(start + o.end_us / 1e3, end))
                about = {"operator": o.name, "shapes": o.shapes, "engine": call.engine}
                yield Span(o.kind, "operator", when, about, track="operators")


class _Engine:
    """An engine that says when it is launched."""

    def __init__(self, engine: Engine, name: str, recorder: _Recorder) -> None:
        self.spec = engine.spec
        self._engine: Any = engine
        self._name, self._recorder = name, recorder
        self._launches = itertools.count()
        self._range = nullcontext if recorder._on_host else _nvtx()[0]

    def bind(self, buffers: Buffers) -> Callable[[], None]:
        launch, recorder, memory = self._engine.bind(buffers), self._recorder, self._recorder.memory
        assert memory is not None

        def recorded() -> None:
            number = next(self._launches)
            with self._range(self._name):
                first, started = memory.mark(), time.perf_counter()
                launch()
                ended, last = time.perf_counter(), memory.mark()
            if recorder.on:
                recorder.calls.append(_Call(self._name, number, (first, last), (started, ended)))

        return recorded

    def end_profile(self) -> Path:
        path: Path = self._engine.end_profile()
        return path

    def close(self) -> None:
        self._engine.close()


def _nvtx() -> tuple[Callable[[str], AbstractContextManager[Any]], str]:
    """What makes a range, and what to say of it."""
    try:
        import nvtx
    except ImportError:
        return nullcontext, "no NVTX ranges: pip install nvtx"
    return nvtx.annotate, "NVTX ranges around every launch"
