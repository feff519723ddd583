"""Backends that profile their engines, each in place of a bundle's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.engines.backend import Runner
from toolchain.engines.buffers import HostMemory
from toolchain.engines.onnxruntime.run import OnnxRuntimeEngine, OnnxRuntimeRunner
from toolchain.engines.openvino.run import OpenVinoEngine, OpenVinoRunner
from toolchain.recipe.options import OnnxRuntimeOptions, OpenVinoOptions
from toolchain.signature import GraphSpec
from toolchain.trace.operators import Launch, read_profile, share_out


@dataclass(frozen=True)
class Call:
    """A launch that was recorded: its number, counted from its engine's opening on, and how long it took around all."""

    number: int
    duration_us: float


class Profiler(Runner[Any], Protocol):
    """A runner that profiles every engine that it opens."""

    def begin(self) -> None:
        """What is launched from now on is recorded."""

    def launches(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, list[Launch]]:
        """Engine -> the launches of its recorded calls, after which no more were made. The engines must still be open,
        and no more is profiled."""


class OnnxRuntimeProfiler(OnnxRuntimeRunner):
    """ONNX Runtime with its profiler on, which writes every launch into a file."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        """`folder` takes the profiles."""
        self._bundle, self._profiles = bundle, folder
        self._engines: dict[str, OnnxRuntimeEngine] = {}

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: OnnxRuntimeOptions,
        memory: HostMemory,
        *,
        profile: str | None = None,
    ) -> OnnxRuntimeEngine:
        """As the runner's, always with a profile."""
        name = _name(self._bundle, folder, spec)
        profile = profile or str(self._profiles / name.replace(" ", "-"))
        self._engines[name] = super().open(folder, weights, spec, options, memory, profile=profile)
        return self._engines[name]

    def begin(self) -> None:
        """Does nothing: the profile tells launches apart."""

    def launches(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, list[Launch]]:
        """From the profiles, which end with it."""
        profiles = {name: read_profile(engine.end_profile()) for name, engine in self._engines.items()}
        return {name: [profiles[name][call.number] for call in recorded] for name, recorded in calls.items()}


class OpenVinoProfiler(OpenVinoRunner):
    """OpenVINO with its counters on, which keep the mean of every operator over all launches of an engine."""

    def __init__(self, bundle: Bundle, _: Path) -> None:
        self._bundle = bundle
        self._engines: dict[str, OpenVinoEngine] = {}
        self._before: dict[str, dict[str, float]] = {}

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: OpenVinoOptions,
        memory: HostMemory,
        *,
        profile: bool = True,
    ) -> OpenVinoEngine:
        """As the runner's, with counters."""
        name = _name(self._bundle, folder, spec)
        self._engines[name] = super().open(folder, weights, spec, options, memory, profile=profile)
        return self._engines[name]

    def begin(self) -> None:
        """Notes the means of what was launched before."""
        self._before = {name: {o.name: o.mean_us for o in e.mean_times()} for name, e in self._engines.items()}

    def launches(self, calls: Mapping[str, Sequence[Call]]) -> dict[str, list[Launch]]:
        """Each with the means over those that were recorded, right to a microsecond or two."""
        return {name: self._launches(name, recorded) for name, recorded in calls.items()}

    def _launches(self, name: str, calls: Sequence[Call]) -> list[Launch]:
        before, earlier = self._before.get(name, {}), calls[0].number
        operators = []
        for o in self._engines[name].mean_times():
            total_us = o.mean_us * (earlier + len(calls)) - before.get(o.name, 0.0) * earlier
            operators.append((o.name, o.kind, max(total_us / len(calls), 0.0), o.shapes))
        return share_out(operators, [call.duration_us for call in calls])


PROFILERS: dict[str, Callable[[Bundle, Path], Profiler]] = {
    "onnxruntime": OnnxRuntimeProfiler,
    "openvino": OpenVinoProfiler,
}
"""Backend -> its profiler, made from a bundle and a scratch folder."""


def _name(bundle: Bundle, folder: Path, spec: GraphSpec) -> str:
    """An engine's, as an observer is given it."""
    return next(
        component if bucket == ANY else f"{component} {bucket}"
        for component, entries in bundle.engines.items()
        for bucket, entry in entries.items()
        if bundle.path / entry.folder == folder and entry.spec == spec  # buckets may share an engine
    )
