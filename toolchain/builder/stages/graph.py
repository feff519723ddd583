"""Stage "graph": a component of a model, for one bucket -> an ONNX graph without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from toolchain.models.component import Component
    from toolchain.models.source import ModelSource
    from toolchain.recipe import Bucket, Recipe


GRAPH = "graph.onnx"


def write(component: Component, source: ModelSource, recipe: Recipe, bucket: Bucket, folder: Path) -> None:
    """Exports the component from its config. Raises ModelError and ExportError."""
    from toolchain.export.capture import capture, write_graph

    write_graph(capture(component, source, recipe, bucket), folder)
