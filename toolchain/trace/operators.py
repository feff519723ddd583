"""How long each operator of each launch of an engine took, as ONNX Runtime's profiler and OpenVINO's counters say."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

LAUNCH = "model_run"
KERNEL = "_kernel_time"


@dataclass(frozen=True)
class Operator:
    """One operator of one launch. Times are microseconds from the launch's start."""

    name: str
    kind: str
    start_us: float
    end_us: float
    shapes: str


@dataclass(frozen=True)
class Launch:
    """One launch, as long as the profiler saw it."""

    duration_us: float
    operators: tuple[Operator, ...]


@dataclass(frozen=True)
class Cost:
    """All calls of one operator. `share` is of the engine's time."""

    name: str
    kind: str
    calls: int
    total_ms: float
    share: float


def read_profile(path: Path) -> list[Launch]:
    """The launches of a profile in order. The profiler counts whole microseconds and lists a launch after its parts."""
    events = json.loads(path.read_text())
    launches = sorted((e for e in events if e["name"] == LAUNCH), key=_start)
    kernels = sorted((e for e in events if e.get("cat") == "Node" and e["name"].endswith(KERNEL)), key=_start)
    read, index = [], 0
    for number, launch in enumerate(launches):
        ends = launches[number + 1]["ts"] if number + 1 < len(launches) else float("inf")
        operators = []
        while index < len(kernels) and kernels[index]["ts"] < ends:
            operators.append(_operator(kernels[index], launch))
            index += 1
        read.append(Launch(float(launch["dur"]), tuple(operators)))
    return read


def share_out(operators: Sequence[tuple[str, str, float, str]], durations_us: Sequence[float]) -> list[Launch]:
    """Launches of these durations, each with the same operators, one after another.

    operators  name, kind, mean microseconds over the launches, shapes

    In a launch that is shorter or longer than the mean, so is every operator.
    """
    mean = sum(durations_us) / len(durations_us)
    launches = []
    for duration in durations_us:
        scale = duration / max(mean, sum(us for _, _, us, _ in operators))
        ends = list(itertools.accumulate(us * scale for _, _, us, _ in operators))
        times = zip([0.0, *ends], ends, strict=False)
        listed = [Operator(n, kind, *when, shapes) for (n, kind, _, shapes), when in zip(operators, times, strict=True)]
        launches.append(Launch(duration, tuple(listed)))
    return launches


def _start(event: dict[str, Any]) -> float:
    return float(event["ts"])


def _operator(event: dict[str, Any], launch: dict[str, Any]) -> Operator:
    about = event["args"]
    start = float(event["ts"] - launch["ts"])
    end = min(start + event["dur"], float(launch["dur"]))
    inputs, outputs = (_shapes(about.get(f"{side}_type_shape", [])) for side in ("input", "output"))
    return Operator(event["name"].removesuffix(KERNEL), about["op_name"], start, end, f"{inputs} -> {outputs}")


def _shapes(tensors: Sequence[dict[str, list[int]]]) -> str:
    return ", ".join(f"{dtype}[{'x'.join(map(str, shape))}]" for t in tensors for dtype, shape in t.items())


def most_expensive(launches: Sequence[Launch], count: int = 10) -> list[Cost]:
    """The operators that took longest over all launches, the longest first."""
    spent: dict[tuple[str, str], list[float]] = {}
    for launch in launches:
        for operator in launch.operators:
            spent.setdefault((operator.name, operator.kind), []).append(operator.end_us - operator.start_us)
    whole = sum(launch.duration_us for launch in launches) or 1.0
    costs = [Cost(*key, len(times), sum(times) / 1e3, sum(times) / whole) for key, times in spent.items()]
    return sorted(costs, key=lambda cost: -cost.total_ms)[:count]
