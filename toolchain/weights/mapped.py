"""safetensors files without torch: where every tensor lies in its file, and the tensors themselves by memory map.

The format (huggingface/safetensors, README): eight bytes, the header's length as little-endian uint64; the header,
JSON: name -> {"dtype", "shape", "data_offsets": [begin, end]}, perhaps "__metadata__"; then the data, without holes.
A flipped bit in the data is not detected here: whoever stores the file keeps its sha256.
"""

from __future__ import annotations

import difflib
import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from toolchain.errors import ModelError, WeightsError

# numpy has no bfloat16 and no float8: their bits come as unsigned integers.
STORAGE_DTYPES = {
    "BOOL": "bool", "U8": "<u1", "I8": "<i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "C64": "<c8", "BF16": "<u2", "F8_E4M3": "<u1",
    "F8_E5M2": "<u1", "F8_E8M0": "<u1",
}  # fmt: skip
MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
GIT_LFS = b"version "
METADATA = "__metadata__"
"""The name in the header that is no tensor's."""
FLOATS = ("F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2")
"""What a weight may be stored as."""
# Tensors beside weights that are not plain numbers: a LoRA's matrices; the scales and tables of bitsandbytes, quanto,
# compressed-tensors, GPTQ and FP8 with scales call them.
LORA = re.compile(r"\.(base_layer|lora_[AB]|lora_(up|down))\.")
QUANTIZED = re.compile(
    r"(^|[._])(absmax|quant_map|quant_state\..*|SCB|_data|_scale|(weight|input)_scale(_inv)?|scale_(weight|input)|"
    r"scaled_fp8|weight_packed|qweight|qzeros)$"
)
EMA = "model_ema."
"""Before the averaged weights that a single file holds beside those that are read."""
NOT_QUANTIZED = "use the model that it was made from, in float16 or bfloat16; the recipe decides the engines' precision"


@dataclass(frozen=True)
class TensorRef:
    """Where a tensor lies: `nbytes` from `offset`, counted from the start of `file`. `dtype` as safetensors has it."""

    file: Path
    key: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


def numpy_dtype(dtype: str) -> np.dtype[Any]:
    """The numpy dtype that holds a safetensors dtype; BF16 and float8 as unsigned integers. KeyError if unknown."""
    return np.dtype(STORAGE_DTYPES[dtype])


def read_header(path: Path) -> dict[str, TensorRef]:
    """Every tensor of a safetensors file, in the order of its data. WeightsError for all that the format forbids."""
    text, size = _read_header(path)
    entries = _parse_header(path, text)
    entries.pop(METADATA, None)
    start = 8 + len(text)
    refs = sorted((_tensor_ref(path, key, entry, start) for key, entry in entries.items()), key=_place)
    _check_layout(path, refs, start=start, size=size)
    return {ref.key: ref for ref in refs}


def read_metadata(path: Path) -> dict[str, str]:
    """What the header of a safetensors file says beside its tensors. WeightsError as `read_header`."""
    metadata: dict[str, str] = _parse_header(path, _read_header(path)[0]).get(METADATA, {})
    return metadata


def _read_header(path: Path) -> tuple[bytes, int]:
    """The header's text, and the size of the file."""
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            return file.read(_header_length(path, file.read(8), size)), size
    except OSError as error:
        raise WeightsError("the weight file cannot be read", where=path, got=error.strerror) from error


def _place(ref: TensorRef) -> tuple[int, int]:
    return ref.offset, ref.nbytes


def _header_length(path: Path, head: bytes, size: int) -> int:
    if head == GIT_LFS:
        raise WeightsError("the weight file is a git-lfs pointer", where=path, hint="fetch the file: git lfs pull")
    length = int.from_bytes(head, "little")
    limit = min(size - 8, MAX_HEADER)
    if len(head) < 8 or length > limit:
        raise WeightsError(
            "the weight file is truncated, or not a safetensors file",
            where=path,
            expected=f"a header of at most {max(limit, 0)} bytes in a file of {size}",
            got=f"a header of {length} bytes" if len(head) == 8 else f"{len(head)} bytes",
            hint="download the file again",
        )
    return length


def _parse_header(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            twice = next(key for i, (key, _) in enumerate(pairs) if key in dict(pairs[:i]))
            raise WeightsError("a name is given twice", where=f"{path}, tensor {twice!r}")
        return table

    try:
        if not text.startswith(b"{"):
            raise ValueError(f"the header starts with {text[:8]!r}")
        header = json.loads(text.decode("utf-8"), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise WeightsError(
            "the header of the weight file is not JSON", where=path, got=error, hint="download the file again"
        ) from error
    metadata = header.get(METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise WeightsError(f"{METADATA} is not a table of strings", where=path, got=repr(metadata)[:100])
    assert isinstance(header, dict)
    return header


def _tensor_ref(path: Path, key: str, entry: Any, start: int) -> TensorRef:
    """One entry of the header; `start` is where the data begin."""
    where = f"{path}, tensor {key!r}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WeightsError(
            "a tensor is not described", where=where, expected="dtype, shape, data_offsets", got=repr(entry)[:100]
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in STORAGE_DTYPES:
        raise WeightsError("unknown dtype", where=where, expected=f"one of {', '.join(STORAGE_DTYPES)}", got=dtype)
    if not _sizes(shape):
        raise WeightsError("the shape is wrong", where=where, expected="a list of sizes", got=shape)
    if not _sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise WeightsError("data_offsets are wrong", where=where, expected="[begin, end]", got=offsets)
    nbytes = prod(shape) * numpy_dtype(dtype).itemsize
    if offsets[1] - offsets[0] != nbytes:
        raise WeightsError(
            "data_offsets do not fit the shape",
            where=where,
            expected=f"{nbytes} bytes for {dtype} {shape}",
            got=f"{offsets[1] - offsets[0]} bytes",
        )
    return TensorRef(path, key, dtype, tuple(shape), start + offsets[0], nbytes)


def _sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and n >= 0 for n in value)


def _check_layout(path: Path, refs: list[TensorRef], *, start: int, size: int) -> None:
    """The data follow one another from `start` to the end of the file, `size`. `refs` are in the order of the data."""
    position = start
    for ref in refs:
        where = f"{path}, tensor {ref.key!r}"
        if ref.offset + ref.nbytes > size:
            raise WeightsError(
                "a tensor lies beyond the end of the file",
                where=where,
                expected=f"a file of {ref.offset + ref.nbytes} bytes at least",
                got=f"{size} bytes",
                hint="the download was cut short; download the file again",
            )
        if ref.offset != position:
            problem = "overlaps the one before it" if ref.offset < position else "leaves a hole before it"
            raise WeightsError(f"a tensor {problem}", where=where, expected=f"offset {position}", got=ref.offset)
        position += ref.nbytes
    if position != size:
        raise WeightsError(
            "the file goes on after its last tensor", where=path, expected=f"{position} bytes", got=f"{size} bytes"
        )


def require_plain(checkpoint: Mapping[str, TensorRef], where: Path) -> None:
    """ModelError for weights that only mean something together with others: quantised ones, and a LoRA beside its base.

    float8 by itself is plain: it is widened, as the libraries do when they load it in another type.
    """
    lora = next(filter(LORA.search, checkpoint), None)
    if lora is not None:
        raise ModelError(
            "the checkpoint was saved with a LoRA beside its weights: whether it was fused cannot be told from it",
            where=where,
            expected="the names of a plain checkpoint",
            got=lora,
            hint="with diffusers: pipeline.fuse_lora(), pipeline.unload_lora_weights(), then save_pretrained(FOLDER)",
        )
    for key, ref in checkpoint.items():
        if key.startswith(EMA):  # names without dots, such as ...attn1to_qweight
            continue
        if QUANTIZED.search(key) or (key.endswith(".weight") and ref.dtype not in FLOATS):
            raise ModelError(
                "the weights are quantised, which is not supported",
                where=where,
                expected="tensors of type " + ", ".join(FLOATS),
                got=f"{key}: {ref.dtype} {list(ref.shape)}",
                hint=NOT_QUANTIZED,
            )


class MappedWeights:
    """The tensors of one safetensors file or of several shards, read-only and without a copy.

    Pages are read when an array is. Arrays stay valid after `close`: the map goes with the last of them.
    """

    def __init__(self, *files: Path) -> None:
        """WeightsError for a damaged file, or for a tensor that is in two of them."""
        self.refs: dict[str, TensorRef] = {}
        self._maps: dict[Path, npt.NDArray[np.uint8]] = {}
        for path in files:
            header = read_header(path)
            for key in header.keys() & self.refs.keys():
                raise WeightsError("a tensor is in two files", where=f"{path}, tensor {key!r}", got=self.refs[key].file)
            self.refs |= header
            self._maps[path] = _map(path)

    def keys(self) -> Iterator[str]:
        """The tensors' names."""
        return iter(self.refs)

    def array(self, key: str) -> npt.NDArray[Any]:
        """A read-only view of the file, in the tensor's shape; BF16 and float8 as unsigned integers.

        Files of other writers may put a tensor at an address that is no multiple of its item size; numpy reads such an
        array correctly, and `array.flags.aligned` tells. WeightsError when there is no such tensor.
        """
        ref = self.refs.get(key)
        if ref is None:
            close = difflib.get_close_matches(key, self.refs, n=1)
            hint = f"did you mean {close[0]!r}?" if close else None
            raise WeightsError(f"no tensor {key!r}", where=", ".join(map(str, self._maps)), hint=hint)
        data = self._maps[ref.file][ref.offset : ref.offset + ref.nbytes]
        return data.view(numpy_dtype(ref.dtype)).reshape(ref.shape)

    def release_pages(self) -> None:
        """Drops the pages that were read from this process's resident memory; reading an array maps them again."""
        for data in self._maps.values():
            file = data.base
            while isinstance(file, (memoryview, np.ndarray)):
                file = file.obj if isinstance(file, memoryview) else file.base
            if isinstance(file, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED"):
                file.madvise(mmap.MADV_DONTNEED)

    def close(self) -> None:
        """Releases the files; no array can be read afterwards."""
        self.refs, self._maps = {}, {}

    def __enter__(self) -> MappedWeights:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _map(path: Path) -> npt.NDArray[np.uint8]:
    try:
        with path.open("rb") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    except OSError as error:
        raise WeightsError("the weight file cannot be mapped", where=path, got=error.strerror) from error
