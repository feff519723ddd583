"""ONNX Runtime with its profiler on, in place of a bundle's backend."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.engines.buffers import HostMemory
from toolchain.engines.onnxruntime.run import OnnxRuntimeEngine, OnnxRuntimeRunner
from toolchain.recipe.options import OnnxRuntimeOptions
from toolchain.signature import GraphSpec
from toolchain.trace.operators import Launch, read_profile


class Profiler(OnnxRuntimeRunner):
    """ONNX Runtime's runner, which profiles every engine of a bundle that it opens."""

    def __init__(self, bundle: Bundle, folder: Path) -> None:
        """`folder` takes the profiles."""
        super().__init__()
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
        name = self._name(folder, spec)
        profile = profile or str(self._profiles / name.replace(" ", "-"))
        self._engines[name] = super().open(folder, weights, spec, options, memory, profile=profile)
        return self._engines[name]

    def _name(self, folder: Path, spec: GraphSpec) -> str:
        """As an observer is given it."""
        return next(
            component if bucket == ANY else f"{component} {bucket}"
            for component, entries in self._bundle.engines.items()
            for bucket, entry in entries.items()
            if self._bundle.path / entry.folder == folder and entry.spec == spec  # buckets may share an engine
        )

    def launches(self) -> dict[str, list[Launch]]:
        """Engine -> its launches since it was opened. The engines must still be open, and no more is profiled."""
        return {name: read_profile(engine.end_profile()) for name, engine in self._engines.items()}
