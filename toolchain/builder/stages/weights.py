"""Stage "weights": a checkpoint -> the weight file that all graphs of a component share, in the backend's form."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.weights.safetensors import read_folder

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.engines.backend import Builder
    from toolchain.precision.activations import Rounded
    from toolchain.precision.changes import Changes
    from toolchain.precision.ranges import Ranges
    from toolchain.precision.stored import Form
    from toolchain.recipe import Quantize
    from toolchain.weights.derived import WeightUse
    from toolchain.weights.mapped import TensorRef

WEIGHTS = "weights.safetensors"


def prepared(backend: Builder[Any], graph: Path, quantize: Quantize | None) -> ir.Model:
    """An exported graph in the backend's form, quantised where asked, and sound: quick, and so no artifact of its own.
    Raises ExportError."""
    from toolchain.graph.typed import check_types
    from toolchain.precision.activations import quantize_activations

    model = _with_weights(backend, graph, quantize)
    if quantize is not None and quantize.activations != "none":
        model = quantize_activations(model, smooth=quantize.smoothing > 0)
    model = backend.finish(model)
    check_types(model)
    return model


def _with_weights(backend: Builder[Any], graph: Path, quantize: Quantize | None) -> ir.Model:
    import onnx_ir as ir

    from toolchain.precision.weight_only import quantize_weights

    model = backend.prepare(ir.load(graph))
    return model if quantize is None else quantize_weights(model, quantize.exclude, _form(quantize))


def _rounded(backend: Builder[Any], graph: Path, quantize: Quantize) -> list[Rounded]:
    from toolchain.precision.activations import rounded_activations

    if quantize.activations == "none":
        return []
    return rounded_activations(_with_weights(backend, graph, quantize), smooth=quantize.smoothing > 0)


def surveyed(backend: Builder[Any], graph: Path, quantize: Quantize) -> dict[str, Any]:
    """Which weights of an exported graph `prepared` quantises, as `Survey.to_json`, and of how many the input."""
    import onnx_ir as ir

    from toolchain.precision.weight_only import survey

    facts = survey(backend.prepare(ir.load(graph)), quantize.exclude, _form(quantize)).to_json()
    return facts | {"inputs": sum(len(a.weights) for a in _rounded(backend, graph, quantize))}


def _form(quantize: Quantize) -> Form:
    from toolchain.precision.stored import Form

    return Form(quantize.weights, quantize.block)


def write(
    backend: Builder[Any],
    checkpoint: Path,
    graph: Path,
    folder: Path,
    quantize: Quantize | None,
    ranges: Ranges | None = None,
) -> None:
    """Streams the tensors that `graph` uses out of the folder `checkpoint`. `ranges` are there where activations are
    rounded. Raises WeightsError and CalibrationError."""
    from toolchain.precision.changes import NONE
    from toolchain.weights.derived import find_tensors, weight_uses, write_weights

    uses = weight_uses(prepared(backend, graph, quantize))
    tensors = find_tensors(uses, read_folder(checkpoint), checkpoint)
    changes = NONE
    if quantize is not None and ranges is not None:
        changes = _changes(_rounded(backend, graph, quantize), uses, tensors, quantize, ranges)
    write_weights(uses, tensors, folder / WEIGHTS, "max" if quantize is None else quantize.scales, changes)


def _changes(
    activations: Sequence[Rounded],
    uses: Sequence[WeightUse],
    tensors: dict[str, TensorRef],
    quantize: Quantize,
    ranges: Ranges,
) -> Changes:
    from toolchain.precision.changes import changes_of
    from toolchain.weights.derived import input_peaks

    smoothed = {name for a in activations if a.smoothing != "none" for name in a.weights}
    peaks = input_peaks(uses, tensors, smoothed)
    return changes_of(activations, ranges, quantize.ranges, peaks, quantize.smoothing)
