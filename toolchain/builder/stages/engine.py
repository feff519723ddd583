"""Stages "packed" and "engine": a graph and its weight files -> what a backend makes of them."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.builder.stages.weights import prepared, surveyed
from toolchain.store.facts import ENGINE_FACTS, QUANTIZED, read_facts

if TYPE_CHECKING:
    from toolchain.engines.backend import Builder
    from toolchain.recipe import Quantize
    from toolchain.recipe.options import BackendOptions


def write_packed(
    backend: Builder[Any],
    graph: Path,
    weights: Mapping[str, Path],
    folder: Path,
    options: BackendOptions,
    quantize: Quantize | None,
) -> None:
    """Weights in the backend's own layout. Raises EngineError."""
    pack = backend.packer(options)
    assert pack is not None, "a plan has this step only where something is packed"
    with _prepared_file(backend, graph, quantize) as path:
        pack(path, weights, folder)


def write_engine(
    backend: Builder[Any],
    graph: Path,
    weights: Mapping[str, Path],
    folder: Path,
    options: BackendOptions,
    quantize: Quantize | None,
    progress: Callable[[str, float | None], None],
) -> None:
    """`weights` is role -> file, `progress` as in `Builder.build`. Raises EngineError."""
    with _prepared_file(backend, graph, quantize) as path:
        backend.build(path, weights, folder, options, progress)
    if quantize is not None:
        facts = folder / ENGINE_FACTS
        survey = surveyed(backend, graph, quantize)
        facts.write_text(json.dumps(read_facts(facts) | {QUANTIZED: survey}, indent=1) + "\n")


@contextmanager
def _prepared_file(backend: Builder[Any], graph: Path, quantize: Quantize | None) -> Iterator[Path]:
    import onnx_ir as ir

    with tempfile.TemporaryDirectory(prefix="diffbuild-") as scratch:
        path = Path(scratch) / graph.name
        ir.save(prepared(backend, graph, quantize), path)
        yield path
