"""Weights in eight bits, against numpy written out, and the weight file that holds them."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from tests.precision.test_weight_only import product, three_convolutions
from toolchain.errors import WeightsError
from toolchain.graph.transpose import transpose_weights
from toolchain.precision.rounding import channel_scales, quantize, stored_scales, stored_values, widened
from toolchain.precision.stored import Stored
from toolchain.precision.weight_only import quantize_weights
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.mapped import MappedWeights, read_header
from toolchain.weights.safetensors import write_safetensors

F32 = np.dtype(np.float32)
BF16 = np.dtype(ml_dtypes.bfloat16)
F16 = np.dtype(np.float16)


def test_halves_go_to_even_and_nothing_is_beyond_127() -> None:
    weight = np.float32([[0.5, 1.5, 2.5, -0.5, -1.5, 127, -127, 128, -500]])
    assert quantize(weight, np.ones(1, F32), 0).tolist() == [[0, 2, 2, 0, -2, 127, -127, 127, -127]]


@pytest.mark.parametrize("dtype", [F32, np.dtype(np.float16), BF16])
@pytest.mark.parametrize(("shape", "axis"), [((6, 5), 0), ((5, 6), 1), ((6, 3, 2, 2), 0), ((3, 6, 2, 2), 1)])
def test_the_largest_weight_of_a_channel_is_127_steps(shape: tuple[int, ...], axis: int, dtype: np.dtype[Any]) -> None:
    weight = np.random.default_rng(0).standard_normal(shape).astype(F32)
    scales = channel_scales(weight, axis, "max", dtype)
    rest = tuple(i for i in range(len(shape)) if i != axis)
    peaks = np.abs(weight).max(axis=rest)
    np.testing.assert_array_equal(scales, (peaks / 127).astype(dtype))
    integers = quantize(weight, scales, axis)
    assert (np.abs(integers).max(axis=rest) >= 126).all()
    wide = np.expand_dims(scales.astype(F32), rest)
    assert (np.abs(integers * wide - weight) <= wide * (0.5 + 127 * 2.0**-8)).all()


def test_a_channel_of_zeros_stays_so() -> None:
    weight = np.zeros((2, 4), F32)
    weight[1] = 1e-9  # what float16 cannot scale is nothing in float16
    scales = channel_scales(weight, 0, "max", F16)
    assert scales[0] == 1
    assert not quantize(weight, scales, 0).any()


@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("bits", ["int8", "int4", "float8"])
def test_what_float16_holds_is_finite_and_not_lost(bits: Any, method: Any) -> None:
    """Scales of the largest weights are not rounded up to what would be infinite, nor those of the least to nothing."""
    magnitudes = np.float32([65504, 65000, 1.06e-5, 3e-6, 6e-7])
    weight = magnitudes[:, None] * np.linspace(-1, 1, 32, dtype=F32)
    stored = Stored(bits, weight.shape, 1, 32) if bits == "int4" else Stored(bits, weight.shape, 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scales = stored_scales(weight, stored, method, F16)
        wide = widened(stored_values(weight, scales, stored), scales, stored).astype(np.float16)
    assert np.isfinite(wide).all()
    steps = scales.astype(F32).reshape(-1, 1) * (1 if bits != "float8" else 32)
    clipped = 0.5 * magnitudes[:, None] if method == "mse" else 1e-3 * magnitudes[:, None]
    assert (np.abs(wide - weight) <= np.maximum(0.51 * steps, clipped)).all()


@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_large_weight_is_searched_in_parts(method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = np.random.default_rng(0).standard_normal((50, 7, 3, 3)).astype(F32)
    whole = channel_scales(weight, 0, method, F32)
    monkeypatch.setattr("toolchain.precision.rounding.AT_ONCE", 200)
    np.testing.assert_array_equal(channel_scales(weight, 0, method, F32), whole)


def squared_error(weight: np.ndarray[Any, Any], scales: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    error: np.ndarray[Any, Any] = ((quantize(weight, scales, 0) * scales[:, None] - weight) ** 2).sum(axis=1)
    return error


def test_least_squared_error_is_never_more_and_clips_an_outlier() -> None:
    weight = np.random.default_rng(1).standard_normal((16, 4096)).astype(F32)
    weight[0, 0] = 6.0
    largest, best = (channel_scales(weight, 0, method, F32) for method in ("max", "mse"))  # type: ignore[arg-type]
    assert (squared_error(weight, best) <= squared_error(weight, largest)).all()
    assert best[0] < largest[0]
    assert (best >= 0.6 * largest * (1 - 1e-6)).all()


@pytest.mark.parametrize("stored", ["F32", "F16", "BF16"])
@pytest.mark.parametrize("method", ["max", "mse"])
def test_a_weight_file_holds_integers_and_scales(stored: str, method: Any, tmp_path: Path) -> None:
    """Computed from the checkpoint's values in whatever type they are, not from what a graph would round them to."""
    kinds = {"F32": F32, "F16": np.dtype(np.float16), "BF16": BF16}
    arrays = {
        name: np.random.default_rng(i).standard_normal((32, 32, 3, 3)).astype(kinds[stored])
        for i, name in enumerate(("first.weight", "body.middle.weight", "last.weight"))
    }
    write(tmp_path, arrays, stored)
    uses = weight_uses(quantize_weights(three_convolutions(), ()))
    write_weights(uses, find_tensors(uses, read_header(tmp_path / "c.safetensors"), tmp_path), tmp_path / "w", method)
    weight = arrays["body.middle.weight"].astype(F32)
    scales = channel_scales(weight, 0, method, F32)
    with MappedWeights(tmp_path / "w") as written:
        assert sorted(written.keys()) == sorted(
            ["first.weight", "last.weight", "body.middle.weight.int8", "body.middle.weight.scales"]
        )
        np.testing.assert_array_equal(written.array("body.middle.weight.scales"), scales)
        np.testing.assert_array_equal(written.array("body.middle.weight.int8"), quantize(weight, scales, 0))
        np.testing.assert_array_equal(written.array("first.weight"), arrays["first.weight"].astype(F32))


def test_a_transposed_weight_has_its_channels_second(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((128, 64)).astype(F32)
    write(tmp_path, {"linear.weight": weight}, "F32")
    uses = weight_uses(quantize_weights(transpose_weights(product("MatMul", (128, 64), flipped=True)), ()))
    write_weights(uses, find_tensors(uses, read_header(tmp_path / "c.safetensors"), tmp_path), tmp_path / "w")
    scales = channel_scales(weight, 0, "max", F32)
    with MappedWeights(tmp_path / "w") as written:
        np.testing.assert_array_equal(written.array("linear.weight.transposed.scales"), scales)
        np.testing.assert_array_equal(written.array("linear.weight.transposed.int8"), quantize(weight, scales, 0).T)


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(wrong: float, tmp_path: Path) -> None:
    weight = np.ones((64, 128), F32)
    weight[3, 4] = wrong
    write(tmp_path, {"linear.weight": weight}, "F32")
    uses = weight_uses(quantize_weights(product("MatMul", (64, 128)), ()))
    tensors = find_tensors(uses, read_header(tmp_path / "c.safetensors"), tmp_path)
    with pytest.raises(WeightsError, match="infinite or NaN in the checkpoint"):
        write_weights(uses, tensors, tmp_path / "w")
    assert not (tmp_path / "w").exists()


@pytest.mark.parametrize("method", ["max", "mse"])
def test_what_the_type_of_the_scales_cannot_hold_is_refused(method: Any, tmp_path: Path) -> None:
    """As for a weight that is not quantised."""
    weight = np.ones((64, 128), F32)
    weight[3, 4] = -66000
    write(tmp_path, {"linear.weight": weight}, "F32")
    uses = weight_uses(quantize_weights(product("MatMul", (64, 128), dtype=ir.DataType.FLOAT16), ()))
    tensors = find_tensors(uses, read_header(tmp_path / "c.safetensors"), tmp_path)
    with pytest.raises(WeightsError, match="beyond the range of F16") as error:
        write_weights(uses, tensors, tmp_path / "w", method)
    assert "66000" in str(error.value)
    assert "keep_float32" in str(error.value)


def write(folder: Path, arrays: dict[str, np.ndarray[Any, Any]], dtype: str) -> None:
    write_safetensors(
        folder / "c.safetensors",
        [(name, dtype, array.shape) for name, array in arrays.items()],
        lambda name: arrays[name].tobytes(),
    )
