"""Stage "weights": a checkpoint -> the weight file that all graphs of a component share, in the backend's form."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.weights.safetensors import read_folder

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.engines.backend import Builder
    from toolchain.precision.weight_only import Survey
    from toolchain.recipe import Quantize

WEIGHTS = "weights.safetensors"


def prepared(backend: Builder[Any], graph: Path, quantize: Quantize | None) -> ir.Model:
    """An exported graph in the backend's form, its weights quantised where asked, and sound: quick, and so no artifact
    of its own. Raises ExportError."""
    import onnx_ir as ir

    from toolchain.graph.typed import check_types
    from toolchain.precision.weight_only import quantize_weights

    model = backend.prepare(ir.load(graph))
    if quantize is not None:
        model = quantize_weights(model, quantize.exclude)
    check_types(model)
    return model


def surveyed(backend: Builder[Any], graph: Path, quantize: Quantize) -> Survey:
    """Which weights of an exported graph `prepared` quantises."""
    import onnx_ir as ir

    from toolchain.precision.weight_only import survey

    return survey(backend.prepare(ir.load(graph)), quantize.exclude)


def write(backend: Builder[Any], checkpoint: Path, graph: Path, folder: Path, quantize: Quantize | None) -> None:
    """Streams the tensors that `graph` uses out of the folder `checkpoint`. Raises WeightsError."""
    from toolchain.weights.derived import find_tensors, weight_uses, write_weights

    uses = weight_uses(prepared(backend, graph, quantize))
    tensors = find_tensors(uses, read_folder(checkpoint), checkpoint)
    write_weights(uses, tensors, folder / WEIGHTS, "max" if quantize is None else quantize.scales)
