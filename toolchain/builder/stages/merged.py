"""Stage "merged": the graphs of several buckets -> one graph with an optimization profile for each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def write(graphs: Sequence[Path], target: Path) -> None:
    """Writes the merged graph to the file `target`. Raises ExportError."""
    import onnx_ir as ir

    from toolchain.graph.profiles import merge_buckets

    ir.save(merge_buckets([ir.load(path) for path in graphs]), target)
