"""Weights in int4 blocks and in float8, against numpy written out, onnx's own unpacking, and the weight files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from tests.precision.test_rounding import write
from tests.precision.test_weight_only import product
from toolchain.graph.transpose import transpose_weights
from toolchain.precision.nbits import use_matmul_nbits
from toolchain.precision.rounding import CLIPPED, stored_scales, stored_values, widened
from toolchain.precision.stored import Form, Stored
from toolchain.precision.weight_only import quantize_weights
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.mapped import MappedWeights, read_header

F32 = np.dtype(np.float32)
F8 = np.dtype(ml_dtypes.float8_e4m3fn)
KINDS = [F32, np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]
Array = np.ndarray[Any, Any]


def blocks(weight: Array, axis: int, block: int) -> Array:
    """[other axis, blocks, block]"""
    turned = weight if axis == 1 else weight.T
    return turned.reshape(turned.shape[0], -1, block)


def onnx_unpacked(values: Array, shape: tuple[int, ...]) -> Array:
    tensor = onnx.helper.make_tensor("w", onnx.TensorProto.INT4, shape, values.tobytes(), raw=True)
    return np.asarray(onnx.numpy_helper.to_array(tensor)).astype(np.int8)


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("shape", "axis"), [((6, 64), 1), ((64, 6), 0), ((7, 96), 1), ((96, 7), 0)])
def test_int4_blocks(shape: tuple[int, int], axis: int, dtype: np.dtype[Any]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(F32)
    stored = Stored("int4", shape, axis, 32)
    scales = stored_scales(weight, stored, "max", dtype)
    by_block = blocks(weight, axis, 32)
    expected = (np.abs(by_block).max(axis=2) / np.float32(7)).astype(dtype)
    np.testing.assert_array_equal(scales if axis == 1 else scales.T, expected)
    steps = np.clip(np.rint(by_block / expected[..., None].astype(F32)), -8, 7)
    rows = steps.reshape(steps.shape[0], -1).astype(np.int8)
    values = stored_values(weight, scales, stored)
    assert values.shape == (weight.size // 2,)
    np.testing.assert_array_equal(onnx_unpacked(values, shape), rows if axis == 1 else rows.T)
    wide = (steps * expected[..., None].astype(F32)).reshape(rows.shape)
    np.testing.assert_array_equal(widened(values, scales, stored), wide if axis == 1 else wide.T)


def test_the_lower_four_bits_come_first() -> None:
    weight = np.float32([[1, -1, 7, -8]])
    values = stored_values(weight, np.ones((1, 1), F32), Stored("int4", (1, 4), 1, 4))
    assert [f"{byte:02x}" for byte in values] == ["f1", "87"]
    assert onnx_unpacked(values, (1, 4)).tolist() == [[1, -1, 7, -8]]
    shifted = stored_values(weight, np.ones((1, 1), F32), Stored("uint4", (1, 4), 1, 4))
    assert [f"{byte:02x}" for byte in shifted.reshape(-1)] == ["79", "0f"]


def test_the_layout_of_matmul_nbits_is_int4_plus_8() -> None:
    weight = np.random.default_rng(0).standard_normal((6, 64)).astype(F32)
    plain, shifted = (Stored(kind, (6, 64), 1, 32) for kind in ("int4", "uint4"))  # type: ignore[arg-type]
    scales = stored_scales(weight, shifted, "mse", F32)
    np.testing.assert_array_equal(scales, stored_scales(weight, plain, "mse", F32))
    values = stored_values(weight, scales, shifted)
    assert values.shape == (6, 2, 16)
    np.testing.assert_array_equal(values.reshape(-1) ^ 0x88, stored_values(weight, scales, plain))
    np.testing.assert_array_equal(
        widened(values, scales, shifted), widened(stored_values(weight, scales, plain), scales, plain)
    )


@pytest.mark.parametrize("kind", ["int4", "float8"])
def test_least_squared_error_is_the_best_of_those_tried(kind: Any) -> None:
    weight = np.random.default_rng(1).standard_normal((8, 256)).astype(F32)
    weight[0, 0] = 6.0
    stored = Stored(kind, weight.shape, 1, 64) if kind == "int4" else Stored(kind, weight.shape, 0)
    most = stored_scales(weight, stored, "max", F32)

    def errors(scales: Array) -> Array:
        squared = (widened(stored_values(weight, scales, stored), scales, stored) - weight) ** 2
        return np.asarray(squared.reshape(*scales.shape, -1).sum(axis=-1))

    tried = np.stack([errors((most * np.float32(share)).astype(F32)) for share in CLIPPED])
    np.testing.assert_allclose(errors(stored_scales(weight, stored, "mse", F32)), tried.min(axis=0), rtol=1e-3)
    assert tried.min(axis=0).sum() < 0.99 * tried[0].sum()


@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize(("shape", "axis"), [((6, 5), 0), ((5, 6), 1), ((6, 3, 2, 2), 0), ((3, 6, 2, 2), 1)])
def test_float8_channels(shape: tuple[int, ...], axis: int, dtype: np.dtype[Any]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(F32)
    stored = Stored("float8", shape, axis)
    scales = stored_scales(weight, stored, "max", dtype)
    rest = tuple(i for i in range(len(shape)) if i != axis)
    np.testing.assert_array_equal(scales, (np.abs(weight).max(axis=rest) / np.float32(448)).astype(dtype))
    wide = np.expand_dims(scales.astype(F32), rest)
    values = stored_values(weight, scales, stored)
    assert values.dtype == np.uint8
    np.testing.assert_array_equal(values.view(F8), np.clip(weight / wide, -448, 448).astype(F8))
    np.testing.assert_array_equal(widened(values, scales, stored), values.view(F8).astype(F32) * wide)
    assert (np.abs(widened(values, scales, stored) - weight) <= np.abs(weight) / 16 + wide * 2.0**-9 + 1e-7).all()


def test_zeros_stay_zeros() -> None:
    weight = np.zeros((2, 64), F32)
    for stored in (Stored("int4", (2, 64), 1, 32), Stored("uint4", (2, 64), 1, 32), Stored("float8", (2, 64), 0)):
        scales = stored_scales(weight, stored, "mse", F32)
        assert (scales == 1).all()
        assert not widened(stored_values(weight, scales, stored), scales, stored).any()


@pytest.mark.parametrize("kind", ["int4", "uint4", "float8"])
def test_a_large_weight_is_worked_on_in_parts(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((50, 64)).astype(F32)
    stored = Stored(kind, (50, 64), 0) if kind == "float8" else Stored(kind, (50, 64), 1, 32)
    scales = stored_scales(weight, stored, "mse", F32)
    values = stored_values(weight, scales, stored)
    monkeypatch.setattr("toolchain.precision.rounding.AT_ONCE", 200)
    np.testing.assert_array_equal(stored_scales(weight, stored, "mse", F32), scales)
    np.testing.assert_array_equal(stored_values(weight, scales, stored), values)


@pytest.mark.parametrize("stored_as", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize(
    ("form", "transposed", "nbits"),
    [
        (Form("int4", 32), False, False),
        (Form("int4", 32), True, False),
        (Form("int4", 32), False, True),
        (Form("int4", 32), True, True),
        (Form("float8"), False, False),
        (Form("float8"), True, False),
    ],
)
def test_a_weight_file(form: Form, transposed: bool, nbits: bool, method: Any, stored_as: str, tmp_path: Path) -> None:
    """From the checkpoint's values in whatever type they are, as torch exports a linear and as backends want it."""
    kinds = {"F32": F32, "F16": np.dtype(np.float16), "BF16": np.dtype(ml_dtypes.bfloat16)}
    weight = np.random.default_rng(0).standard_normal((128, 64)).astype(kinds[stored_as])
    write(tmp_path, {"linear.weight": weight}, stored_as)
    graph = product("MatMul", (128, 64), flipped=True)
    graph = quantize_weights(transpose_weights(graph) if transposed else graph, (), form)
    if nbits:
        # A Transpose is in between where the weight was not stored transposed, and no backend that has it does that.
        graph = use_matmul_nbits(graph)
    uses = weight_uses(graph)
    write_weights(uses, find_tensors(uses, read_header(tmp_path / "c.safetensors"), tmp_path), tmp_path / "w", method)
    plain = weight.astype(F32)
    (use,) = uses
    assert use.stored is not None
    with MappedWeights(tmp_path / "w") as written:
        assert {str(name) for name in graph.graph.initializers} == set(written.keys())
        scales = written.array(f"{use.name}.scales")
        values = written.array(f"{use.name}.{use.stored.kind}")
        wide = widened(values, scales, use.stored)
    expected = Stored("int4", (128, 64), 1, 32) if form.block else Stored("float8", (128, 64), 0)
    best = stored_scales(plain, expected, method, F32)
    reference = widened(stored_values(plain, best, expected), best, expected)
    np.testing.assert_array_equal(wide if use.stored.shape == (128, 64) else wide.T, reference)
    size = weight.size // 2 if form.block else weight.size
    assert (tmp_path / "w").stat().st_size == pytest.approx(size + scales.nbytes, abs=600)
