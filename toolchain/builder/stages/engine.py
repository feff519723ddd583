"""Stages "packed" and "engine": a graph and its weight files -> what a backend makes of them."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.builder.stages.weights import prepared

if TYPE_CHECKING:
    from toolchain.engines.backend import Backend


def write_packed(
    backend: Backend, graph: Path, weights: Mapping[str, Path], folder: Path, options: Mapping[str, Any]
) -> None:
    """Weights in the backend's own layout. Raises EngineError."""
    with _prepared_file(backend, graph) as path:
        backend.pack(path, weights, folder, options)


def write_engine(
    backend: Backend,
    graph: Path,
    weights: Mapping[str, Path],
    folder: Path,
    options: Mapping[str, Any],
    progress: Callable[[str, float | None], None],
) -> None:
    """`weights` is role -> file, `progress` as in `Backend.build`. Raises EngineError."""
    with _prepared_file(backend, graph) as path:
        backend.build(path, weights, folder, options, progress)


@contextmanager
def _prepared_file(backend: Backend, graph: Path) -> Iterator[Path]:
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(prefix="diffbuild-") as scratch:
        path = Path(scratch) / graph.name
        ir.save(prepared(backend, graph), path)
        yield path
