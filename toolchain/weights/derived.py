"""The weight file of a component: every initializer of its graphs, streamed from the checkpoint in one pass.

One file serves all buckets. A tensor is copied, converted to the graph's dtype, transposed or quantised, one at a time.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.errors import WeightsError
from toolchain.graph.placeholder import is_weight, static_shape
from toolchain.graph.transpose import SUFFIX
from toolchain.graph.upsample import SUFFIX as UPSAMPLED
from toolchain.graph.upsample import folded
from toolchain.precision.activations import added_names
from toolchain.precision.changes import NONE, Changes, Peaks
from toolchain.precision.nbits import nbits_weights
from toolchain.precision.rounding import Scales, stored_scales, stored_values
from toolchain.precision.stored import FILE_DTYPES, SCALES, Stored
from toolchain.precision.weight_only import dequantized_weights
from toolchain.weights.mapped import FLOATS, MappedWeights, TensorRef, numpy_dtype
from toolchain.weights.safetensors import write_safetensors

SAFETENSORS_DTYPES = {
    ir.DataType.FLOAT: "F32", ir.DataType.FLOAT16: "F16", ir.DataType.BFLOAT16: "BF16", ir.DataType.DOUBLE: "F64",
    ir.DataType.INT8: "I8", ir.DataType.INT16: "I16", ir.DataType.INT32: "I32", ir.DataType.INT64: "I64",
    ir.DataType.UINT8: "U8", ir.DataType.UINT16: "U16", ir.DataType.UINT32: "U32", ir.DataType.UINT64: "U64",
    ir.DataType.BOOL: "BOOL", ir.DataType.FLOAT8E4M3FN: "F8_E4M3",
}  # fmt: skip
"""ONNX's type -> its name in a weight file, which has none for four bits or strings."""
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
    """An initializer of a graph: which checkpoint tensor it is, in which dtype, and whether transposed (2-D only) or
    folded, as a convolution after upsampling is.

    stored  how it lies in a weight file where it is quantised: then two initializers, its values and their scales,
            stand for it, and `dtype` is that of the scales
    """

    name: str
    key: str
    dtype: str
    shape: tuple[int, ...]
    transposed: bool
    folded: bool = False
    stored: Stored | None = None

    @property
    def source_shape(self) -> tuple[int, ...]:
        """In the checkpoint."""
        if self.folded:
            return (self.shape[0] // 4, self.shape[1], 3, 3)
        return self.shape[::-1] if self.transposed else self.shape

    @property
    def tensors(self) -> list[tuple[str, str, tuple[int, ...]]]:
        """Name, dtype and shape of what a weight file holds of it."""
        stored = self.stored
        if stored is None:
            return [(self.name, self.dtype, self.shape)]
        values = (f"{self.name}.{stored.kind}", FILE_DTYPES[stored.kind], stored.values_shape)
        return [values, (self.name + SCALES, self.dtype, stored.scales_shape)]


def weight_uses(model: ir.Model) -> list[WeightUse]:
    """The weights of a graph, sorted by name."""
    uses = []
    quantized = dequantized_weights(model) | nbits_weights(model)
    parts = {name + part for name, stored in quantized.items() for part in (f".{stored.kind}", SCALES)}
    parts |= added_names(model)
    for name, value in model.graph.initializers.items():
        if is_weight(value) and name not in parts:
            tensor = _tensor(value)
            uses.append(_use(name, tensor.dtype, static_shape(tensor), None))
    for name, stored in quantized.items():
        scales = _tensor(model.graph.initializers[name + SCALES])
        uses.append(_use(name, scales.dtype, stored.shape, stored))
    return sorted(uses, key=lambda use: use.name)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None
    return value.const_value


def _use(name: str, dtype: ir.DataType, shape: tuple[int, ...], stored: Stored | None) -> WeightUse:
    key = name.removesuffix(SUFFIX).removesuffix(UPSAMPLED)
    transposed, doubled = name.endswith(SUFFIX), name.endswith(UPSAMPLED)
    return WeightUse(name, key, SAFETENSORS_DTYPES[dtype], shape, transposed, doubled, stored)


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
        shape = use.source_shape
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


def input_peaks(uses: Iterable[WeightUse], tensors: Mapping[str, TensorRef], names: Collection[str]) -> Peaks:
    """For each input of the quantised matrices `names` in the checkpoint the largest magnitude of its weights. Reads
    one of them at a time."""
    peaks = {}
    with _opened(tensors) as files:
        for use in uses:
            if use.key in names and use.stored is not None:
                ref = tensors[use.name]
                weight = _convert(_read(files, use, ref), replace(use, dtype="F32"), _where(ref))
                peaks[use.key] = np.abs(weight).max(axis=use.stored.axis)
    return peaks


def write_weights(
    uses: list[WeightUse],
    tensors: Mapping[str, TensorRef],
    path: Path,
    method: Scales = "max",
    changes: Changes = NONE,
) -> None:
    """Writes `path` as safetensors, keyed by initializer name. Raises WeightsError for values that are not finite.

    method  how the scales of quantised weights are chosen
    """
    with _opened(tensors) as files:

        def load(use: WeightUse) -> NDArray[Any]:
            ref = tensors[use.name]
            files[ref.file].release_pages()  # of what was read before: a large file would fill the memory
            return _read(files, use, ref)

        write_loaded(uses, load, path, method, changes, where=lambda use: _where(tensors[use.name]))


def write_loaded(
    uses: list[WeightUse],
    load: Callable[[WeightUse], NDArray[Any]],
    path: Path,
    method: Scales,
    changes: Changes = NONE,
    *,
    where: Callable[[WeightUse], str] = lambda use: use.key,
) -> None:
    """`write_weights` of what `load` gives: each weight as the checkpoint has it, twice where it is quantised."""
    by_name = {name: use for use in uses for name, _, _ in use.tensors}
    scales: dict[str, NDArray[Any]] = {}  # by the name of the weight: small, and needed for its values again
    listed = [tensor for use in uses for tensor in use.tensors]
    listed += [(name, *_kind(array)) for name, array in changes.added.items()]

    def read(name: str) -> NDArray[Any]:
        if name in changes.added:
            return changes.added[name].view(numpy_dtype(_kind(changes.added[name])[0]))
        use = by_name[name]
        factor, array = changes.factors.get(use.key), load(use)
        if use.stored is None:
            array = array if factor is None else array.astype(np.float32) * factor
            return _convert(array, use, where(use)).view(numpy_dtype(use.dtype))  # bfloat16 as bits, as files hold it
        weight = _convert(array, replace(use, dtype="F32"), where(use))
        largest = np.abs(weight).max(initial=0).reshape(1)
        # It must fit the type that the scales widen it to.
        _convert(largest, replace(use, transposed=False, folded=False), where(use))
        if factor is not None:
            weight = weight * np.expand_dims(factor, use.stored.axis)
        if use.name not in scales:
            scales[use.name] = stored_scales(weight, use.stored, method, FLOAT_DTYPES[use.dtype])
        if name.endswith(SCALES):
            return scales[use.name].view(numpy_dtype(use.dtype))
        return stored_values(weight, scales[use.name], use.stored)

    write_safetensors(path, listed, read)


@contextmanager
def _opened(tensors: Mapping[str, TensorRef]) -> Iterator[dict[Path, MappedWeights]]:
    with ExitStack() as stack:
        yield {f: stack.enter_context(MappedWeights(f)) for f in {ref.file for ref in tensors.values()}}


def _read(files: Mapping[Path, MappedWeights], use: WeightUse, ref: TensorRef) -> NDArray[Any]:
    """A tensor of the checkpoint as it lies there, in the shape that its use expects."""
    array: NDArray[Any] = files[ref.file].array(ref.key).view(FLOAT_DTYPES[ref.dtype])
    return array.reshape(use.source_shape)


def _kind(array: NDArray[Any]) -> tuple[str, tuple[int, ...]]:
    """A float array's name of its type in a weight file, and its shape."""
    return next(name for name, dtype in FLOAT_DTYPES.items() if dtype == array.dtype), array.shape


def _where(ref: TensorRef) -> str:
    return f"{ref.file}: {ref.key}"


def _convert(array: NDArray[Any], use: WeightUse, where: str) -> NDArray[Any]:
    if use.folded:
        array = folded(array.astype(np.float32))
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
            where=where,
            got=f"largest magnitude {np.abs(array.astype(np.float32)).max():g}",
            hint="keep its module in float32 (keep_float32 in the recipe) or use bfloat16" if "beyond" in was else None,
        )
    return converted
