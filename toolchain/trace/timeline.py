"""A trace as a document of Chrome's trace events, and as a summary. Imports nothing heavy.

The format: "Trace Event Format" of the Chromium project. Complete events ("X") of one thread nest by their times.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from toolchain.store.files import write_atomic
from toolchain.store.plain_json import encode
from toolchain.terminal import table
from toolchain.trace.operators import Launch, most_expensive

TRACKS = {"pipeline": "pipeline", "host": "host: launches and tokenizers", "operators": "operators"}


@dataclass(frozen=True)
class Span:
    """An interval on the timeline.

    kind     generation, stage, step, engine, launch or operator
    when_ms  (start, end) from the beginning of the recording
    """

    name: str
    kind: str
    when_ms: tuple[float, float]
    about: Mapping[str, Any] = field(default_factory=dict)
    track: str = "pipeline"

    @property
    def ms(self) -> float:
        """How long it took, in milliseconds."""
        return self.when_ms[1] - self.when_ms[0]


@dataclass(frozen=True)
class Trace:
    """One generation.

    spans     in order of their tracks and starts, parents before their children
    launches  engine -> what the profiler said of its recorded launches; empty where operators were not asked for
    nvtx      on a GPU, whether there are NVTX ranges
    """

    name: str
    about: Mapping[str, Any]
    spans: tuple[Span, ...]
    launches: Mapping[str, tuple[Launch, ...]]
    nvtx: str | None = None

    def of(self, kind: str) -> list[Span]:
        """The spans of one kind."""
        return [span for span in self.spans if span.kind == kind]

    def document(self) -> dict[str, Any]:
        """Chrome's trace events. Times are microseconds."""
        numbers = {track: number for number, track in enumerate(TRACKS, start=1)}
        used = {span.track for span in self.spans}
        events: list[dict[str, Any]] = [_meta("process_name", 0, name=f"diffbuild {self.name}")]
        for track in (t for t in TRACKS if t in used):
            events.append(_meta("thread_name", numbers[track], name=TRACKS[track]))
            events.append(_meta("thread_sort_index", numbers[track], sort_index=numbers[track]))
        for span in self.spans:
            start, end = (round(ms * 1e3, 3) for ms in span.when_ms)
            event = {"ph": "X", "pid": 1, "tid": numbers[span.track], "ts": start, "dur": round(end - start, 3)}
            events.append({"name": span.name, "cat": span.kind, **event, "args": dict(span.about)})
        return {"displayTimeUnit": "ms", "otherData": dict(self.about), "traceEvents": events}

    def save(self, path: Path) -> None:
        """Writes the document, whole or not at all. StoreError when the disk refuses."""
        write_atomic(path, f"{encode(self.document(), indent=None)}\n".encode())

    def summary(self) -> dict[str, Any]:
        """Sums of the spans."""
        (whole,) = self.of("generation")
        engines = _sums(self.of("engine"))
        operators = {
            name: [asdict(cost) for cost in most_expensive(launches)] for name, launches in self.launches.items()
        }
        return {
            **self.about,
            "total_ms": whole.ms,
            "evaluations": len(self.of("step")),
            "stages": {name: ms for name, (_, ms) in _sums(self.of("stage")).items()},
            "engines": {name: {"calls": calls, "total_ms": ms} for name, (calls, ms) in engines.items()},
            "operators": operators,
        }

    def lines(self) -> Iterator[str]:
        """The summary for a terminal."""
        summary = self.summary()
        total, inside = summary["total_ms"], sum(engine["total_ms"] for engine in summary["engines"].values())
        yield f"{summary['evaluations']} evaluations in {total:.1f} ms, {inside / total:.1%} of it inside the engines"
        rows = [[name, f"{ms:.1f} ms", f"{ms / total:.1%}", ""] for name, ms in summary["stages"].items()]
        for name, engine in summary["engines"].items():
            calls, ms = engine["calls"], engine["total_ms"]
            rows.append([f"engine {name}", f"{ms:.1f} ms", f"{ms / total:.1%}", f"{calls} calls"])
        yield from table(rows)
        for name, costs in summary["operators"].items():
            yield ""
            yield f"the most expensive operators of {name}:"
            head = ["operator", "type", "calls", "total", "share"]
            listed = [[c["name"], c["kind"], str(c["calls"]), f"{c['total_ms']:.2f} ms"] for c in costs]
            rows = [[*row, f"{c['share']:.1%}"] for row, c in zip(listed, costs, strict=True)]
            yield from table(rows, head=head)
        if self.nvtx:
            yield self.nvtx


def _meta(what: str, thread: int, **args: Any) -> dict[str, Any]:
    return {"ph": "M", "pid": 1, "tid": thread, "name": what, "args": args}


def _sums(spans: list[Span]) -> dict[str, tuple[int, float]]:
    """Name -> (count, total milliseconds)."""
    sums: dict[str, tuple[int, float]] = {}
    for span in spans:
        count, ms = sums.get(span.name, (0, 0.0))
        sums[span.name] = (count + 1, ms + span.ms)
    return sums
