"""Stages "watched" and "calibration": a graph whose activations are watched -> an engine; its launches -> ranges."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from toolchain.builder.stages.weights import prepared
from toolchain.errors import EngineError, WeightsError
from toolchain.precision.collect import Collector
from toolchain.weights.mapped import MappedWeights
from toolchain.weights.range_file import write_ranges
from toolchain.weights.safetensors import write_safetensors

if TYPE_CHECKING:
    from toolchain.engines.backend import Builder
    from toolchain.recipe.options import BackendOptions

RANGES = "ranges.safetensors"
DONE = "done"
STATE_DTYPES = {"float32": "F32", "float64": "F64", "int64": "I64"}


def write_watched(
    backend: Builder[Any],
    graph: Path,
    weights: Mapping[str, Path],
    folder: Path,
    options: BackendOptions,
    progress: Callable[[str, float | None], None],
) -> None:
    """An engine of an exported graph, with an output that tells how large its activations are. Raises EngineError."""
    import onnx_ir as ir

    from toolchain.precision.watch import watch

    with tempfile.TemporaryDirectory(prefix="diffbuild-") as scratch:
        path = Path(scratch) / graph.name
        ir.save(watch(prepared(backend, graph, None)), path)
        backend.build(path, weights, folder, options, progress)


def collector_of(backend: Builder[Any], graph: Path) -> Collector:
    """Of what the added output of `write_watched`'s engine tells."""
    from toolchain.precision.watch import watched

    return Collector(watched(prepared(backend, graph, None)))


def write(
    collectors: Mapping[str, Collector],
    count: int,
    batch: int,
    draw: Callable[[int], None],
    about: Mapping[str, Any],
    folder: Path,
    partial: Path,
    progress: Callable[[str, float | None], None],
) -> None:
    """Draws pictures until there are `count` and writes the ranges of their activations.

    collectors  by component
    draw        called with the number of a picture: draws it and those after it, `batch` in all, and has the collectors
                watch
    about       for `write_ranges`
    partial     a file that an interrupted call goes on from

    Raises EngineError for activations that are not finite, and what `draw` raises.
    """
    for first in range(_restore(partial, collectors), count, batch):
        progress(f"drawing {count} pictures", first / count)
        draw(first)
        _require_finite(collectors)
        _save(partial, collectors, first + batch)
    write_ranges(folder / RANGES, {name: c.ranges() for name, c in collectors.items()}, about)
    partial.unlink(missing_ok=True)


def _require_finite(collectors: Mapping[str, Collector]) -> None:
    for component, collector in collectors.items():
        if weights := collector.overflowing():
            raise EngineError(
                "activations are infinite or NaN, and so there are no ranges of them",
                where=component,
                got=f"the inputs of {', '.join(weights[:5])}" + (" and others" if len(weights) > 5 else ""),
                hint="their modules overflow the component's dtype: name them in keep_float32, or take another dtype",
            )


def _save(partial: Path, collectors: Mapping[str, Collector], done: int) -> None:
    tensors: dict[str, NDArray[Any]] = {DONE: np.array([done], np.int64)}
    for component, collector in collectors.items():
        tensors |= {f"{component}.{name}": array for name, array in collector.state().items()}
    listed = [(name, STATE_DTYPES[str(array.dtype)], array.shape) for name, array in tensors.items()]
    partial.parent.mkdir(parents=True, exist_ok=True)
    write_safetensors(partial, listed, lambda name: tensors[name])


def _restore(partial: Path, collectors: Mapping[str, Collector]) -> int:
    """How many pictures the collectors have seen, once they are as an interrupted call left them: 0 without one."""
    if not partial.exists():
        return 0
    before = {component: collector.state() for component, collector in collectors.items()}
    try:
        with MappedWeights(partial) as saved:
            for component, collector in collectors.items():
                collector.restore({name: saved.array(f"{component}.{name}") for name in collector.state()})
            return int(saved.array(DONE)[0])
    except (WeightsError, ValueError):  # damaged by whatever interrupted it
        for component, collector in collectors.items():
            collector.restore(before[component])
        return 0
