"""Reading safetensors files: against the safetensors library, and every way in which a file can be wrong."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch

from toolchain.errors import WeightsError
from toolchain.weights.mapped import STORAGE_DTYPES, MappedWeights, TensorRef, read_header

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "conv.weight": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "half": np.linspace(-1, 1, 7, dtype=np.float16),
    "scalar": np.array(3.5, np.float64),
    "empty": np.zeros((0, 4), np.float32),
    "counts": np.arange(-5, 5, dtype=np.int64),
    "flags": np.array([True, False, True]),
    "ünï.cödé": np.arange(3, dtype=np.uint8),
}


def test_reads_what_the_library_writes(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(ARRAYS, path, metadata={"format": "pt"})
    header = read_header(path)
    assert header.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        ref = header[key]
        assert (ref.file, ref.key, ref.shape, ref.nbytes) == (path, key, array.shape, array.nbytes)
        assert path.read_bytes()[ref.offset : ref.offset + ref.nbytes] == array.tobytes()
    with MappedWeights(path) as weights:
        assert set(weights.keys()) == ARRAYS.keys()
        for key, array in ARRAYS.items():
            got = weights.array(key)
            assert got.dtype == array.dtype
            assert got.shape == array.shape
            np.testing.assert_array_equal(got, array)


def test_types_without_numpy_equal_come_as_bits(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    tensors = {
        "bf16": torch.randn(5, 3).to(torch.bfloat16),
        "f8": torch.randn(9).to(torch.float8_e4m3fn),
    }
    safetensors.torch.save_file(tensors, path)
    weights = MappedWeights(path)
    assert weights.refs["bf16"].dtype == "BF16"
    assert weights.array("bf16").dtype == np.uint16
    np.testing.assert_array_equal(weights.array("bf16"), tensors["bf16"].view(torch.uint16).numpy())
    np.testing.assert_array_equal(weights.array("f8"), tensors["f8"].view(torch.uint8).numpy())


def test_arrays_are_read_only_views_that_outlive_close(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.arange(4, dtype=np.float32)}, path)
    weights = MappedWeights(path)
    first, second = weights.array("a"), weights.array("a")
    assert not first.flags.owndata
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0] = 1
    weights.close()
    assert first.tolist() == [0, 1, 2, 3]
    with pytest.raises(WeightsError, match="no tensor 'a'"):
        weights.array("a")


def test_several_files(tmp_path: Path) -> None:
    one, two = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    safetensors.numpy.save_file({"a": np.arange(4)}, one)
    safetensors.numpy.save_file({"b": np.arange(5)}, two)
    assert MappedWeights(one, two).array("b").tolist() == [0, 1, 2, 3, 4]
    safetensors.numpy.save_file({"a": np.arange(5)}, two)
    with pytest.raises(WeightsError, match="in two files"):
        MappedWeights(one, two)


def test_a_wrong_name_gets_the_nearest(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"conv_in.weight": np.arange(4)}, path)
    with pytest.raises(WeightsError, match=r"did you mean 'conv_in\.weight'"):
        MappedWeights(path).array("conv_in.weigth")


def file_of(header: Any, data: bytes = b"", pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) + pad).to_bytes(8, "little") + text + b" " * pad + data


def entry(begin: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - begin] if shape is None else shape, "data_offsets": [begin, end]}


def test_accepts_padding_and_an_empty_file_and_odd_alignment(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(
        file_of({"a": entry(0, 3), "b": entry(3, 11, "F32", [2])}, b"xyz" + np.array([1, 2], np.float32).tobytes(), 5)
    )
    weights = MappedWeights(path)
    assert weights.array("b").tolist() == [1, 2]
    path.write_bytes(file_of({}))
    assert read_header(path) == {}
    assert list(MappedWeights(path).keys()) == []


def test_order_is_that_of_the_data(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"b": entry(2, 4), "a": entry(0, 2), "z": entry(2, 2)}, b"1234"))
    start = path.stat().st_size - 4
    assert list(read_header(path)) == ["a", "z", "b"]
    assert read_header(path)["b"] == TensorRef(path, "b", "U8", (2,), start + 2, 2)


CORRUPT = {
    "empty file": (b"", "truncated"),
    "seven bytes": (b"\1\0\0\0\0\0\0", "got: 7 bytes"),
    "header beyond the file": ((100).to_bytes(8, "little") + b"{}", "got: a header of 100 bytes"),
    "header of 2**63": (b"\xff" * 8 + b"{}", "truncated"),
    "git-lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "not JSON": (file_of(b"{nonsense}"), "not JSON"),
    "nested without end": (file_of(b'{"a":' + b"[" * 100_000), "not JSON"),
    "not UTF-8": (file_of(b'{"\xff": 1}'), "not JSON"),
    "a list": (file_of(b"[]"), "not JSON"),
    "space before the brace": (file_of(b" {}"), "not JSON"),
    "duplicate tensor": (file_of(b'{"a": {}, "a": {}}'), "tensor 'a'"),
    "metadata": (file_of({"__metadata__": {"a": 1}}), "__metadata__"),
    "entry is a list": (file_of({"t": []}), "tensor 't'"),
    "entry lacks dtype": (file_of({"t": {"shape": [1], "data_offsets": [0, 1]}}, b"1"), "tensor 't'"),
    "entry has more": (file_of({"t": entry(0, 1) | {"stride": [1]}}, b"1"), "tensor 't'"),
    "unknown dtype": (file_of({"t": entry(0, 1, "Q4")}, b"1"), "unknown dtype"),
    "dtype is a number": (file_of({"t": entry(0, 1, 4)}, b"1"), "unknown dtype"),
    "negative shape": (file_of({"t": entry(0, 1, shape=[-1, -1])}, b"1"), "shape is wrong"),
    "shape of floats": (file_of({"t": entry(0, 1, shape=[1.0])}, b"1"), "shape is wrong"),
    "shape of booleans": (file_of({"t": entry(0, 1, shape=[True])}, b"1"), "shape is wrong"),
    "shape is a number": (file_of({"t": entry(0, 1, shape=1)}, b"1"), "shape is wrong"),
    "offsets backwards": (file_of({"t": entry(1, 0, shape=[1])}, b"1"), "data_offsets are wrong"),
    "offsets negative": (file_of({"t": entry(-1, 0)}, b"1"), "data_offsets are wrong"),
    "three offsets": (file_of({"t": entry(0, 1) | {"data_offsets": [0, 1, 1]}}, b"1"), "data_offsets are wrong"),
    "size and shape differ": (file_of({"t": entry(0, 4, "F32", [2])}, b"1234"), "expected: 8 bytes for F32"),
    "huge shape": (file_of({"t": entry(0, 4, "F32", [2**62, 2**62])}, b"1234"), "do not fit the shape"),
    "cut in the data": (file_of({"a": entry(0, 4), "t": entry(4, 8)}, b"123456"), "tensor 't'"),
    "overlap": (file_of({"a": entry(0, 4), "t": entry(2, 6)}, b"123456"), "overlaps"),
    "hole": (file_of({"a": entry(0, 2), "t": entry(4, 6)}, b"123456"), "hole"),
    "hole at the start": (file_of({"t": entry(2, 6)}, b"123456"), "hole"),
    "bytes after the end": (file_of({"t": entry(0, 4)}, b"12345"), "goes on"),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_refuses_corrupt_files(tmp_path: Path, name: str) -> None:
    content, says = CORRUPT[name]
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    for read in (read_header, MappedWeights):
        with pytest.raises(WeightsError) as caught:
            read(path)
        assert says in str(caught.value)
        assert str(path) in str(caught.value)


def test_refuses_a_header_above_100_mb(tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    with path.open("wb") as file:
        file.write((100_000_001).to_bytes(8, "little"))
        file.truncate(200_000_000)  # sparse
    with pytest.raises(WeightsError, match="header of at most 100000000 bytes"):
        read_header(path)


def test_every_truncation_is_seen(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file({"a": np.arange(4, dtype=np.float32), "b": np.arange(3, dtype=np.int8)}, path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(WeightsError):
            read_header(path)


@pytest.mark.parametrize("name", ["missing.safetensors", "."])
def test_unreadable_files(tmp_path: Path, name: str) -> None:
    with pytest.raises(WeightsError, match="cannot be read"):
        read_header(tmp_path / name)


def test_item_sizes_agree_with_the_library() -> None:
    for dtype, size in {"BOOL": 1, "F8_E4M3": 1, "BF16": 2, "F16": 2, "F32": 4, "C64": 8, "F64": 8, "I64": 8}.items():
        assert np.dtype(STORAGE_DTYPES[dtype]).itemsize == size
