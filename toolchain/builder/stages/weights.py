"""Stage "weights": a checkpoint -> the weight file that all graphs of a component share, in the backend's form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.weights.safetensors import read_folder

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.engines.backend import Builder

WEIGHTS = "weights.safetensors"


def prepared(backend: Builder[Any], graph: Path) -> ir.Model:
    """An exported graph in the backend's form, and sound: quick, and so no artifact of its own. Raises ExportError."""
    import onnx_ir as ir

    from toolchain.graph.typed import check_types

    model = backend.prepare(ir.load(graph))
    check_types(model)
    return model


def write(backend: Builder[Any], checkpoint: Path, graph: Path, folder: Path) -> None:
    """Streams the tensors that `graph` uses out of the folder `checkpoint`. Raises WeightsError."""
    from toolchain.weights.derived import find_tensors, weight_uses, write_weights

    uses = weight_uses(prepared(backend, graph))
    write_weights(uses, find_tensors(uses, read_folder(checkpoint), checkpoint), folder / WEIGHTS)
