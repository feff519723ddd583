"""The weight file of a component: every initializer of its graphs, streamed from the checkpoint in one pass.

One file serves all buckets. A tensor is copied, converted to the graph's dtype or transposed, one at a time.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.errors import WeightsError
from toolchain.graph.placeholder import is_weight, static_shape
from toolchain.graph.transpose import SUFFIX
from toolchain.weights.mapped import FLOATS, MappedWeights, TensorRef, numpy_dtype
from toolchain.weights.safetensors import write_safetensors

SAFETENSORS_DTYPES = {
    ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16", ir.DataType.DOUBLE: "F64",
    ir.DataType.INT8: "I8", ir.DataType.INT16: "I16", ir.DataType.INT32: "I32", ir.DataType.INT64: "I64",
    ir.DataType.UINT8: "U8", ir.DataType.UINT16: "U16", ir.DataType.UINT32: "U32", ir.DataType.UINT64: "U64",
    ir.DataType.BOOL: "BOOL",
}  # fmt: skip
"""ONNX's type -> its name in a weight file, which has none for four bits or strings; float8 is widened."""
FLOAT_DTYPES = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F64": np.dtype(np.float64),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
}
"""A float's name in a safetensors file -> numpy's type, of ml_dtypes for bfloat16 and float8."""
assert tuple(FLOAT_DTYPES) == FLOATS
# Checkpoints older than the current class use other names for the same tensors; diffusers and transformers rename
# them while loading. (current part, older part)
RENAMED = (
    (".to_q.", ".query."),
    (".to_k.", ".key."),
    (".to_v.", ".value."),
    (".to_out.0.", ".proj_attn."),
)
TEXT_PREFIX = "text_model."
# Of the safety checker, whose vision model held another of that name before transformers 5.
VISION_PREFIX = "vision_model."
# T5 holds one embedding under two names; a checkpoint has either or both.
TIED = {"encoder.embed_tokens.weight": "shared.weight", "shared.weight": "encoder.embed_tokens.weight"}


@dataclass(frozen=True)
class WeightUse:
    """An initializer of a graph: which checkpoint tensor it is, in which dtype, and whether transposed (2-D only)."""

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool


def weight_uses(model: ir.Model) -> list[WeightUse]:
    """The weights of a graph, sorted by name."""
    uses = []
    for name, value in model.graph.initializers.items():
        if is_weight(value):
            tensor = value.const_value
            assert tensor is not None
            transposed = name.endswith(SUFFIX)
            uses.append(
                WeightUse(
                    name, name.removesuffix(SUFFIX), SAFETENSORS_DTYPES[tensor.dtype], static_shape(tensor), transposed
                )
            )
    return sorted(uses, key=lambda use: use.name)


def find_tensors(uses: Iterable[WeightUse], checkpoint: Mapping[str, TensorRef], where: Path) -> dict[str, TensorRef]:
    """The checkpoint tensor of every use, by the use's name.

    Raises WeightsError that names what is missing, with the nearest key, and what has another shape.
    """
    tensors: dict[str, TensorRef] = {}
    problems = []
    for use in uses:
        key = next((k for k in _spellings(use.key) if k in checkpoint), None)
        if key is None:
            close = difflib.get_close_matches(use.key, checkpoint, n=1)
            problems.append(f"{use.key}: missing" + (f"; the nearest is {close[0]}" if close else ""))
            continue
        ref = checkpoint[key]
        shape = use.shape[::-1] if use.transposed else use.shape
        # Old VAE checkpoints hold their attention projections as 1x1 convolutions.
        if ref.shape != shape and ref.shape != (*shape, 1, 1):
            problems.append(f"{key}: expected shape {list(shape)}, got {list(ref.shape)}")
        elif ref.dtype not in FLOAT_DTYPES:
            problems.append(f"{key}: expected a floating-point tensor, got {ref.dtype}")
        tensors[use.name] = ref
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise WeightsError(
            "the checkpoint does not hold the tensors of the model that its config describes:\n    "
            + "\n    ".join(shown),
            where=where,
            hint="config.json and the weights belong together; download the folder again",
        )
    return tensors


def _spellings(key: str) -> list[str]:
    older = key
    for new, old in RENAMED:
        older = older.replace(new, old)
    bare = key.removeprefix(TEXT_PREFIX)
    doubled = VISION_PREFIX + key if key.startswith(VISION_PREFIX) else key
    return [key, older, TIED.get(key, key), TEXT_PREFIX + key, bare, doubled]


def write_weights(uses: list[WeightUse], tensors: Mapping[str, TensorRef], path: Path) -> None:
    """Writes `path` as safetensors, keyed by initializer name. Raises WeightsError for values that are not finite."""
    by_name = {use.name: use for use in uses}
    files = {file: MappedWeights(file) for file in {ref.file for ref in tensors.values()}}

    def read(name: str) -> NDArray[Any]:
        use, ref = by_name[name], tensors[name]
        raw = files[ref.file].array(ref.key)
        array = raw.view(FLOAT_DTYPES[ref.dtype]).reshape(use.shape[::-1] if use.transposed else use.shape)
        return _convert(array, use, ref)

    try:
        write_safetensors(path, [(use.name, use.dtype, use.shape) for use in uses], read)
    finally:
        for mapped in files.values():
            mapped.close()


def _convert(array: NDArray[Any], use: WeightUse, ref: TensorRef) -> NDArray[Any]:
    if use.transposed:
        array = array.T
    with np.errstate(over="ignore"):
        converted = np.ascontiguousarray(array, dtype=FLOAT_DTYPES[use.dtype])
    if not np.isfinite(converted).all():
        was = (
            "infinite or NaN in the checkpoint" if not np.isfinite(array).all() else f"beyond the range of {use.dtype}"
        )
        raise WeightsError(
            f"a weight is {was}",
            where=f"{ref.file}: {ref.key}",
            got=f"largest magnitude {np.abs(array.astype(np.float32)).max():g}",
            hint="keep its module in float32 (keep_float32 in the recipe) or use bfloat16" if "beyond" in was else None,
        )
    return converted.view(numpy_dtype(use.dtype))  # of bfloat16 the bits, as the files hold them
