"""Finding and writing weights: round trips with the safetensors library, folders laid as diffusers lays them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from huggingface_hub import save_torch_state_dict

from toolchain.errors import ModelError, WeightsError
from toolchain.weights.mapped import MappedWeights, TensorRef, read_header, require_plain
from toolchain.weights.safetensors import find_weights, read_folder, write_safetensors

ARRAYS: dict[str, np.ndarray[Any, Any]] = {
    "flag": np.array([True, False, True]),
    "half": np.linspace(-1, 1, 7, dtype=np.float16),
    "transposed": np.arange(12, dtype=np.float32).reshape(3, 4).T,
    "scalar": np.array(3.5, np.float64),
    "empty": np.zeros((0, 4), np.float32),
    "complex": np.array([1 + 2j], np.complex64),
    "ünï": np.arange(-5, 5, dtype=np.int64),
}
NAMES = {"bool": "BOOL", "float16": "F16", "float32": "F32", "float64": "F64", "complex64": "C64", "int64": "I64"}


def announce(arrays: dict[str, np.ndarray[Any, Any]]) -> list[tuple[str, str, tuple[int, ...]]]:
    return [(key, NAMES[str(array.dtype)], array.shape) for key, array in arrays.items()]


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    path = tmp_path / "out.safetensors"
    write_safetensors(path, announce(ARRAYS), ARRAYS.__getitem__)
    loaded = safetensors.numpy.load_file(path)
    assert loaded.keys() == ARRAYS.keys()
    for key, array in ARRAYS.items():
        assert loaded[key].dtype == array.dtype
        np.testing.assert_array_equal(loaded[key], array)
    assert [p.name for p in tmp_path.iterdir()] == ["out.safetensors"]


def test_alignment(tmp_path: Path) -> None:
    for extra in range(64):  # every length of header
        path = tmp_path / "out.safetensors"
        arrays = {"a" * (extra + 1): np.zeros(3, bool)} | ARRAYS
        write_safetensors(path, announce(arrays), arrays.__getitem__)
        refs = read_header(path)
        assert min(ref.offset for ref in refs.values()) % 64 == 0
        with MappedWeights(path) as weights:
            assert all(weights.array(key).flags.aligned for key in arrays)


def test_bfloat16_through_bytes_views_and_arrays(tmp_path: Path) -> None:
    tensor = torch.randn(4, 6).to(torch.bfloat16)
    bits = tensor.view(torch.uint16).numpy()
    for data in (bits, bits.tobytes(), memoryview(bits.tobytes()), bits.data):
        path = tmp_path / "out.safetensors"
        write_safetensors(path, [("t", "BF16", (4, 6))], lambda _, data=data: data)  # type: ignore[misc]
        assert torch.equal(safetensors.torch.load_file(path)["t"], tensor)


def test_one_tensor_at_a_time_in_the_order_of_the_file(tmp_path: Path) -> None:
    asked: list[str] = []

    def read(name: str) -> np.ndarray[Any, Any]:
        asked.append(name)
        return ARRAYS[name]

    write_safetensors(tmp_path / "out.safetensors", announce(ARRAYS), read)
    refs = read_header(tmp_path / "out.safetensors")
    assert sorted(asked) == sorted(ARRAYS)
    assert [key for key in asked if ARRAYS[key].size] == [key for key in refs if ARRAYS[key].size]


def test_equal_input_gives_equal_bytes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write_safetensors(tmp_path / name, announce(ARRAYS), ARRAYS.__getitem__)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize(
    ("tensors", "data", "says"),
    [
        ([("t", "F32", (2,)), ("t", "F32", (2,))], b"", "a name is duplicate, or reserved by the format"),
        ([("__metadata__", "F32", (2,))], b"", "a name is duplicate, or reserved by the format"),
        ([("t", "float32", (2,))], b"", "unknown dtype"),
        ([("t", "F32", (2,))], b"1234567", "expected: 8"),
        ([("t", "F32", (2,))], np.zeros(2, np.int32), "got: int32"),
        ([("t", "F32", (2,))], np.zeros((1, 2), np.float32), "expected: float32"),
        ([("t", "F32", (2,))], np.zeros(2, ">f4"), "got: >f4"),
    ],
)
def test_refuses_other_data_and_leaves_the_old_file(tmp_path: Path, tensors: Any, data: Any, says: str) -> None:
    path = tmp_path / "out.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(WeightsError, match=says):
        write_safetensors(path, tensors, lambda _: data)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match="cannot be written"):
        write_safetensors(tmp_path / "none" / "out.safetensors", [], lambda _: b"")


# Folders


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for i, name in enumerate(names):
        if name.endswith(".safetensors"):
            safetensors.numpy.save_file({f"t{i}": np.arange(3)}, folder / name)
        elif name.endswith(".json"):
            shards = sorted(path.name for path in folder.glob("*-of-*.safetensors"))
            where = {key: shard for shard in shards for key in read_header(folder / shard)}
            (folder / name).write_text(json.dumps({"metadata": {}, "weight_map": where}))
        else:
            (folder / name).write_bytes(b"pickle")


MODEL, DIFFUSION = "model.safetensors", "diffusion_pytorch_model.safetensors"
FP16, EMA = "model.fp16.safetensors", "model.non_ema.safetensors"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
SHARDS16 = ("model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors")
INDEX, INDEX16, OLD_INDEX16 = (
    f"model.{middle}.json" for middle in ("safetensors.index", "safetensors.index.fp16", "fp16.safetensors.index")
)


@pytest.mark.parametrize(
    ("files", "variant", "expected"),
    [
        ((MODEL,), None, (MODEL,)),
        ((DIFFUSION, "diffusion_pytorch_model.bin"), None, (DIFFUSION,)),
        ((MODEL, FP16, EMA), None, (MODEL,)),
        ((MODEL, FP16), "fp16", (FP16,)),
        ((FP16,), None, (FP16,)),
        ((FP16, EMA), "non_ema", (EMA,)),
        ((*SHARDS, INDEX), None, SHARDS),
        ((*SHARDS, INDEX, FP16), "fp16", (FP16,)),
        ((*SHARDS16, INDEX16), None, SHARDS16),
        ((*SHARDS16, OLD_INDEX16, MODEL), "fp16", SHARDS16),
        ((MODEL, "other.safetensors"), None, (MODEL,)),
    ],
)
def test_finds(tmp_path: Path, files: tuple[str, ...], variant: str | None, expected: tuple[str, ...]) -> None:
    put(tmp_path, *files)
    assert find_weights(tmp_path, variant=variant) == [tmp_path / name for name in expected]
    refs = read_folder(tmp_path, variant=variant)
    assert {ref.file.name for ref in refs.values()} == set(expected)
    assert MappedWeights(*find_weights(tmp_path, variant=variant)).refs.keys() == refs.keys()


@pytest.mark.parametrize(
    ("files", "variant", "says"),
    [
        ((), None, "there are no weights"),
        (("config.json",), None, "there are no weights"),
        (("pytorch_model.bin", "a.ckpt"), None, "safe_serialization=True"),
        ((MODEL,), "fp16", "'fp16'"),
        ((FP16, EMA), None, "not there"),
        ((MODEL, DIFFUSION), None, "more than one"),
        ((MODEL, *SHARDS, INDEX), None, "more than one"),
        (SHARDS, None, "index.json"),
        (("unet.safetensors",), None, "renamed"),
        (("model.gguf",), None, "GGUF"),
    ],
)
def test_refuses(tmp_path: Path, files: tuple[str, ...], variant: str | None, says: str) -> None:
    put(tmp_path, *files)
    for find in (find_weights, read_folder):
        with pytest.raises(ModelError) as caught:
            find(tmp_path, variant=variant)
        assert says in str(caught.value)
        assert str(tmp_path) in str(caught.value)


FOREIGN = {  # as each tool leaves them
    "mid_block.to_q.base_layer.weight": ("F32", "unload_lora_weights"),
    "mid_block.to_q.lora_A.default_0.weight": ("F32", "unload_lora_weights"),
    "layers.0.weight.absmax": ("F32", "quantised"),
    "layers.0.weight.quant_state.bitsandbytes__nf4": ("U8", "quantised"),
    "layers.0.SCB": ("F32", "quantised"),
    "layers.0.scale_weight": ("F32", "quantised"),
    "layers.0.weight_scale": ("F32", "quantised"),
    "scaled_fp8": ("F8_E4M3", "quantised"),
    "layers.0.weight._data": ("I8", "quantised"),
    "layers.0.qweight": ("I32", "quantised"),
    "layers.0.weight": ("U8", "U8"),
    "layers.1.weight": ("F8_E8M0", "F8_E8M0"),
}
PLAIN = {"text_model.embeddings.position_ids": "I64", "logit_scale": "F32", "a.weight": "F8_E5M2", "up.scale": "F16"}


@pytest.mark.parametrize("key", FOREIGN)
def test_weights_that_mean_something_with_others_alone(tmp_path: Path, key: str) -> None:
    plain = {name: TensorRef(tmp_path, name, dtype, (2,), 0, 2) for name, dtype in PLAIN.items()}
    require_plain(plain, tmp_path)
    dtype, says = FOREIGN[key]
    with pytest.raises(ModelError) as caught:
        require_plain({**plain, key: TensorRef(tmp_path, key, dtype, (2,), 0, 2)}, tmp_path)
    assert says in str(caught.value)
    assert key in str(caught.value)


def test_refuses_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="folder of the weights is missing"):
        find_weights(tmp_path / "unet")


def test_missing_shard_is_named(tmp_path: Path) -> None:
    put(tmp_path, *SHARDS, INDEX)
    (tmp_path / SHARDS[1]).unlink()
    for find in (find_weights, read_folder):
        with pytest.raises(WeightsError, match=f"a shard is missing\n.*{SHARDS[1]}"):
            find(tmp_path)


@pytest.mark.parametrize(
    ("weight_map", "says"),
    [
        ({"t0": SHARDS[0], "t1": SHARDS[0]}, "a shard lacks a tensor"),
        ({"t0": SHARDS[1], "t1": SHARDS[1]}, "a shard lacks a tensor"),
        ({"t0": SHARDS[1], "t1": SHARDS[0]}, "index and shards disagree"),
        ({"t0": SHARDS[0], "t1": SHARDS[1], "t2": SHARDS[1]}, "'t2'"),
        ({"t0": SHARDS[0], "t7": SHARDS[1]}, "not in the index"),
    ],
)
def test_index_and_shards_disagree(tmp_path: Path, weight_map: dict[str, str], says: str) -> None:
    put(tmp_path, *SHARDS)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(WeightsError, match=says):
        read_folder(tmp_path)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/model.safetensors"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
        '{"weight_map": {"a": 1}}',
    ],
)
def test_damaged_index(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(WeightsError, match="index") as caught:
        find_weights(tmp_path)
    assert INDEX in str(caught.value)


@pytest.mark.parametrize("stem", ["diffusion_pytorch_model", "diffusion_pytorch_model.fp16"])
@pytest.mark.parametrize("shard_size", ["5GB", "2KB"])
def test_reads_what_the_hub_library_saves(tmp_path: Path, stem: str, shard_size: str) -> None:
    """The function that `save_pretrained` of diffusers 0.42 and transformers 5 shards with, and the names they give."""
    state = {f"layer.{i}.weight": torch.randn(16, 16).to(torch.bfloat16 if i % 2 else torch.float32) for i in range(8)}
    save_torch_state_dict(state, tmp_path, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=shard_size)
    files = find_weights(tmp_path)
    assert (len(files) > 1) == (shard_size == "2KB")
    refs = read_folder(tmp_path)
    weights = MappedWeights(*files)
    assert refs == weights.refs
    assert refs.keys() == state.keys()
    for key, tensor in state.items():
        assert weights.array(key).tobytes() == tensor.view(torch.uint8).numpy().tobytes()
