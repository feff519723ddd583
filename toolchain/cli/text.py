"""What several commands print alike: sizes, ages, devices, memory and the safety checker."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from toolchain.terminal import table

if TYPE_CHECKING:
    from toolchain.bundle.forecast import EngineMemory

CHECKER_STATES = {
    "compiled": "safety checker: compiled; pictures that it flags are black",
    "left out": "safety checker: the model comes with one or requires one, and it is left out; "
    "[safety] checker = true in the recipe compiles it",
}
"""By what `models.safety.state` says; nothing of models that have none."""


def megabytes(size: int) -> str:
    """A size in bytes, in decimal units with one digit behind the point."""
    for unit, one in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= one:
            return f"{size / one:.1f} {unit}"
    return f"{size} B"


def age(seconds: float) -> str:
    """How long ago something was, in the largest unit that it fills."""
    for unit, one in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= one:
            return f"{seconds / one:.0f} {unit} ago"
    return "just now"


def device_line(device: Mapping[str, Any]) -> str:
    """What engines are tied to, in one line."""
    return ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in device.items())


def checker_lines(state: str | None) -> list[str]:
    """At most one line on the safety checker; none for bundles that predate it."""
    return [CHECKER_STATES[state]] if state in CHECKER_STATES else []


def ranges_lines(about: Mapping[str, Any] | None) -> list[str]:
    """At most one line on where the ranges of a file come from."""
    if about is None:
        return []
    keys = ("pictures", "steps", "scheduler", "backend")
    facts = ", ".join(f"{about[key]} {key}" if key in keys[:2] else str(about[key]) for key in keys if key in about)
    return [f"ranges: of activations, from a file, drawn with {about.get('model', 'an unnamed model')} ({facts})"]


def gate_lines(gate: Mapping[str, Any] | None) -> Iterator[str]:
    """What the check of a build said of a quantised bundle; nothing of bundles that have nothing to check."""
    if gate is None:
        return
    if "reason" in gate:
        yield f"gate: not run, because {gate['reason']}"
        return
    yield f"gate: {gate['verdict']}, {gate['seconds']:.0f} s; the nearest to their limits, or beyond:"
    yield from (f"  {text}" for text in gate["worst"])
    yield f"time: {gate['step_time']['text']}"


def quantized_lines(quantized: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """How many weights of each component are in fewer bits, and why others are not."""
    for component, facts in quantized.items():
        left = ", ".join(f"{len(names)} {reason}" for reason, names in facts["left"].items())
        what = "weights and their inputs" if facts.get("inputs") else "weights"
        yield f"{component}: {facts['weights']} of {facts['of']} {what} in {facts['type']}" + (
            f"; left alone: {left}" if left else ""
        )


def memory_lines(engines: Sequence[EngineMemory]) -> Iterator[str]:
    """A table of what each engine takes; nothing for no engines."""
    if not engines:
        return
    head = ["", "weights", "session", "buffers", "activations", "arena", "together"]
    rows = []
    for e in engines:
        activations = "unknown" if e.activations is None else megabytes(e.activations)
        sizes = [megabytes(size) for size in (e.weights, e.session, e.buffers)]
        name = e.name if e.built else f"{e.name}, exported"
        rows.append([name, *sizes, activations, megabytes(e.arena), megabytes(e.total)])
    yield from table(rows, head=head)
