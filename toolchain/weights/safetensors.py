"""Weights of a component on disk: the files in a model's folder, and new safetensors files written in a stream."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from toolchain.errors import ModelError, WeightsError
from toolchain.weights.mapped import METADATA, NOT_QUANTIZED, STORAGE_DTYPES, TensorRef, numpy_dtype, read_header

Data = bytes | memoryview | npt.NDArray[Any]

ALIGNMENT = 64  # bytes; a cache line, and as much as any vector load wants
STEMS = ("diffusion_pytorch_model", "model")  # what diffusers and transformers call them
# The variant stands before the last suffix in the names that both write; older repositories have it after the stem.
NAMES = tuple(
    re.compile(rf"(?:{'|'.join(STEMS)}){form}")
    for form in (
        r"(?:\.(?P<variant>\w+))?\.safetensors",
        r"\.safetensors\.index(?:\.(?P<variant>\w+))?\.json",
        r"\.(?P<variant>\w+)\.safetensors\.index\.json",
    )
)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")


def find_weights(folder: Path, *, variant: str | None = None) -> list[Path]:
    """The safetensors files of a component, in order: one file, or the shards that an index names.

    `variant`: "fp16" and the like. Without it the plain files are taken, or the only variant that there is.
    ModelError where none or more than one set of weights is there; WeightsError for a wrong index or a missing shard.
    """
    entry = _find_entry(folder, variant)
    if entry.suffix == ".safetensors":
        return [entry]
    return [folder / name for name in sorted(set(_read_index(entry).values()))]


def read_folder(folder: Path, *, variant: str | None = None) -> dict[str, TensorRef]:
    """Every tensor of a component. Errors of `find_weights` and `read_header`, and where index and shards disagree."""
    entry = _find_entry(folder, variant)
    if entry.suffix == ".safetensors":
        return read_header(entry)
    index = _read_index(entry)
    refs: dict[str, TensorRef] = {}
    for name in sorted(set(index.values())):
        for key, ref in read_header(folder / name).items():
            if index.get(key) != name:
                got = f"{index[key]} in the index" if key in index else "not in the index"
                raise WeightsError("index and shards disagree", where=f"{folder / name}, tensor {key!r}", got=got)
            refs[key] = ref
    for key in index.keys() - refs.keys():
        raise WeightsError("a shard lacks a tensor of the index", where=f"{folder / index[key]}, tensor {key!r}")
    return refs


def _find_entry(folder: Path, variant: str | None) -> Path:
    """The single file, or the index."""
    sets: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        for match in filter(None, (name.fullmatch(path.name) for name in NAMES)):
            sets.setdefault(match["variant"], []).append(path)
    if not sets:
        raise _no_weights(folder)
    if variant is None and None not in sets and len(sets) == 1:
        (variant,) = sets
    entries = sets.get(variant, [])
    names = ", ".join(path.name for paths in sets.values() for path in paths)
    if not entries:
        expected = f"the variant {variant!r}" if variant else "weights without a variant, or of one variant only"
        raise ModelError("the weights asked for are not there", where=folder, expected=expected, got=names)
    if len(entries) > 1:
        raise ModelError(
            "more than one set of weights", where=folder, expected="one", got=names, hint="remove all but one"
        )
    return entries[0]


def _no_weights(folder: Path) -> ModelError:
    expected = " or ".join(f"{stem}.safetensors" for stem in STEMS)
    if not folder.is_dir():
        return ModelError("the folder of the weights is missing", where=folder, expected=expected)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    if gguf := [path.name for path in sorted(folder.glob("*.gguf"))]:
        what = "the weights are quantised (GGUF), which is not supported"
        return ModelError(what, where=folder, expected=expected, got=", ".join(gguf[:5]), hint=NOT_QUANTIZED)
    hint = "download the model again; `diffbuild export` alone works without weights"
    if pickles:
        hint = (
            "a pickle can run code when it is opened; where you trust it, convert the model once with "
            "diffusers: pipeline.save_pretrained(FOLDER, safe_serialization=True)"
        )
    elif others:
        hint = "shards need their *.safetensors.index.json; a file of another name must be renamed"
    what = "the weights are only there as pickles, which are not opened" if pickles else "there are no weights"
    got = ", ".join((pickles or others)[:5]) or "no *.safetensors file"
    return ModelError(what, where=folder, expected=expected, got=got, hint=hint)


def _read_index(path: Path) -> dict[str, str]:
    """Tensor -> file name; every file is there."""
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        names = {key: str(name) for key, name in index.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        expected = '{"weight_map": {tensor: file}}'
        raise WeightsError("the index of the shards is damaged", where=path, expected=expected, got=error) from error
    for name in sorted(set(names.values())):
        # A name with a path could lead out of the model's folder.
        if not re.fullmatch(r"[^/\\]+\.safetensors", name):
            raise WeightsError(
                "the index names a file outside its folder, or none", where=path, expected="*.safetensors", got=name
            )
        if not (path.parent / name).is_file():
            raise WeightsError(
                "a shard is missing",
                where=path.parent / name,
                expected=f"named in {path.name}",
                hint="download it again",
            )
    if not names:
        raise WeightsError("the index of the shards is empty", where=path)
    return names


def write_safetensors(
    path: Path,
    tensors: Sequence[tuple[str, str, tuple[int, ...]]],
    read: Callable[[str], Data],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write (name, dtype, shape) tensors; `read(name)` is called once for each, and one is in memory at a time.

    metadata  what the header says beside the tensors: see `mapped.read_metadata`

    Data start at a multiple of 64 bytes. The format allows no holes, so that tensors of larger items come first: then
    each is aligned to its own item. The file appears under its name when it is whole. WeightsError where `read` returns
    another dtype, shape or size than announced, or the file cannot be written.
    """
    ordered = sorted(tensors, key=lambda tensor: -_itemsize(path, tensor))
    header = _header(path, ordered, metadata or {})
    partial = path.with_name(path.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(header)
            for name, dtype, shape in ordered:
                _write_tensor(file, f"{path}, tensor {name!r}", read(name), dtype, shape)
        partial.replace(path)
    except OSError as error:
        raise WeightsError("the weight file cannot be written", where=path, got=error.strerror) from error
    finally:
        partial.unlink(missing_ok=True)


def _itemsize(path: Path, tensor: tuple[str, str, tuple[int, ...]]) -> int:
    name, dtype, _ = tensor
    if dtype not in STORAGE_DTYPES:
        where = f"{path}, tensor {name!r}"
        raise WeightsError("unknown dtype", where=where, expected=f"one of {', '.join(STORAGE_DTYPES)}", got=dtype)
    return numpy_dtype(dtype).itemsize


def _header(path: Path, tensors: Sequence[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, Any] = {METADATA: dict(metadata)} if metadata else {}
    position = 0
    for name, dtype, shape in tensors:
        if name in entries or name == METADATA:
            raise WeightsError("a name is duplicate, or reserved by the format", where=f"{path}, tensor {name!r}")
        end = position + prod(shape) * numpy_dtype(dtype).itemsize
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


def _write_tensor(file: BinaryIO, where: str, data: Data, dtype: str, shape: tuple[int, ...]) -> None:
    """An array must have the dtype and shape that were announced; bytes only their length."""
    if isinstance(data, np.ndarray):
        if data.shape != shape or data.dtype != numpy_dtype(dtype):
            expected, got = f"{numpy_dtype(dtype)} {shape}", f"{data.dtype} {data.shape}"
            raise WeightsError(
                "the array has another dtype or shape than announced", where=where, expected=expected, got=got
            )
        data = np.ascontiguousarray(data).reshape(-1).view(np.uint8).data
    nbytes = prod(shape) * numpy_dtype(dtype).itemsize
    length = data.nbytes if isinstance(data, memoryview) else len(data)
    if length != nbytes:
        raise WeightsError("the data have another size than announced", where=where, expected=nbytes, got=length)
    file.write(data)
