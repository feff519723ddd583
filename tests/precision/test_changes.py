"""Scales and factors that are made of ranges, and what smoothing does to a product."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from tests.precision.test_activations import normed, projections
from tests.precision.test_engines import BUILDER, run
from tests.precision.test_ranges import seen
from tests.precision.test_rounding import write
from tests.precision.test_weight_only import product
from toolchain.errors import CalibrationError
from toolchain.precision.activations import Rounded, quantize_activations, rounded_activations
from toolchain.precision.changes import FURTHEST, Changes, changes_of, smoothing
from toolchain.precision.ranges import BINS, Range
from toolchain.precision.stored import Bits
from toolchain.precision.weight_only import quantize_weights
from toolchain.weights.derived import find_tensors, input_peaks, weight_uses
from toolchain.weights.mapped import read_header

F32 = np.dtype(np.float32)


def of(*peaks: float) -> Range:
    """One channel, a step for each."""
    array = np.array(peaks, np.float32)
    return Range(array.reshape(-1, 1), array, np.zeros(BINS, np.int64))


def channels(*peaks: float) -> Range:
    """One step."""
    array = np.array(peaks, np.float32).reshape(1, -1)
    return Range(array, array.max(axis=1), np.zeros(BINS, np.int64))


def plain(*weights: str, dtype: ir.DataType = ir.DataType.FLOAT, bits: Bits = "int8") -> Rounded:
    return Rounded(weights, dtype, bits, "none")


def test_a_scale_is_the_largest_magnitude_over_127() -> None:
    ranges = {"a": of(127, 254), "b": of(508)}
    assert changes_of([plain("a")], ranges, "max", {}, 0).added == {"a.input.scales": 2}
    assert changes_of([plain("a")], ranges, "first_steps=0.5", {}, 0).added == {"a.input.scales": 1}
    assert changes_of([plain("a", "b")], ranges, "max", {}, 0).added == {"a.input.scales": 4}
    assert changes_of([plain("a", bits="float8")], {"a": of(896)}, "max", {}, 0).added == {"a.input.scales": 2}


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16])
def test_a_scale_has_the_type_of_its_activation(dtype: ir.DataType) -> None:
    (scale,) = changes_of([plain("a", dtype=dtype)], {"a": of(127)}, "max", {}, 0).added.values()
    assert (scale.dtype, scale.shape) == (dtype.numpy(), ())


def test_a_scale_that_float16_would_round_to_nothing() -> None:
    changes = changes_of([plain("a", dtype=ir.DataType.FLOAT16)], {"a": of(1e-9)}, "max", {}, 0)
    assert changes.added["a.input.scales"] == np.finfo(np.float16).tiny


def test_ranges_that_are_of_no_use() -> None:
    ranges = {"nan": of(float("nan")), "zero": of(0), "infinite": of(float("inf")), "good": of(1)}
    with pytest.raises(CalibrationError) as error:
        changes_of([plain("absent"), plain(*ranges)], ranges, "max", {}, 0)
    assert str(error.value).splitlines()[1:] == [
        "    absent: was not watched",
        "    nan: its input reached nan",
        "    zero: its input was never anything but zero",
        "    infinite: its input reached inf",
        "  hint: calibrate this model again, or name the modules in quantize.exclude",
    ]
    with pytest.raises(CalibrationError, match="and 2 more"):
        changes_of([plain(*map(str, range(10)))], {}, "max", {}, 0)


def test_smoothing_factors() -> None:
    x, w = np.float32([16, 16, 0, 4, 1e30]), np.float32([4, 1, 4, 0, 1e-30])
    np.testing.assert_allclose(smoothing(x, w, 0.5), [2, 4, 1, 1, FURTHEST])
    np.testing.assert_allclose(smoothing(x, w, 1.0), [16, 16, 1, 1, FURTHEST])


def test_projections_of_one_activation_share_their_factors() -> None:
    """The largest weight of all decides. What is in the graph, rounded, undoes what the weights are multiplied with."""
    activation = Rounded(("k", "q"), ir.DataType.FLOAT16, "int8", "multiplied")
    peaks = {"q": np.float32([1, 1]), "k": np.float32([4, 1])}
    changes = changes_of([activation], dict.fromkeys("kq", channels(16, 9)), "max", peaks, 0.5)
    np.testing.assert_array_equal(changes.added["k.input.factors"], np.float16([1 / 2, 1 / 3]))
    np.testing.assert_array_equal(changes.factors["q"] * changes.added["k.input.factors"].astype(F32), [1, 1])
    np.testing.assert_array_equal(changes.factors["q"], changes.factors["k"])
    assert changes.added["k.input.scales"] == np.float16(8 / 127)


def test_another_method_keeps_its_share_of_the_largest() -> None:
    activation = Rounded(("a",), ir.DataType.FLOAT, "int8", "multiplied")
    range_ = Range(np.float32([[8, 4], [16, 9]]), np.float32([8, 16]), np.zeros(BINS, np.int64))
    scales = [
        float(changes_of([activation], {"a": range_}, method, {"a": np.float32([1, 1])}, 0.5).added["a.input.scales"])
        for method in ("max", "first_steps=0.5")
    ]
    assert scales == pytest.approx([4 / 127, 2 / 127])


def smoothed(made: ir.Model, folder: Path, arrays: dict[str, np.ndarray], data: np.ndarray, alpha: float) -> Changes:
    """Of a graph whose weights were quantised, for an activation that was seen as `data`."""
    write(folder, arrays, "F32")
    activations = rounded_activations(made, smooth=alpha > 0)
    uses = weight_uses(quantize_activations(made, smooth=alpha > 0))
    names = {name for activation in activations for name in activation.weights}
    tensors = find_tensors(uses, read_header(folder / "c.safetensors"), folder)
    ranges = dict.fromkeys(names, seen(data, steps=1))
    return changes_of(activations, ranges, "max", input_peaks(uses, tensors, names), alpha)


@pytest.mark.parametrize("flipped", [False, True])
def test_a_channel_of_outliers_costs_less_with_smoothing(flipped: bool, tmp_path: Path) -> None:
    """One channel is a hundred times as large as the others: their error is a third at most."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((128, 64) if flipped else (64, 128)).astype(F32)
    data = generator.standard_normal((4, 64)).astype(F32)
    data[:, 7] *= 100
    errors = []
    for alpha in (0.0, 0.5):
        (tmp_path / str(alpha)).mkdir()
        made = quantize_weights(BUILDER.prepare(product("MatMul", weight.shape, flipped=flipped)), ())
        changes = smoothed(made, tmp_path / str(alpha), {"linear.weight": weight}, data, alpha)
        graph = BUILDER.finish(quantize_activations(made, smooth=alpha > 0))
        y, _ = run(tmp_path / str(alpha), graph, {"linear.weight": weight}, data, "all", changes)
        expected = data @ (weight.T if flipped else weight)
        # What the outliers contribute is exact either way: the error is held against what the others do.
        expected -= np.outer(data[:, 7], (weight.T if flipped else weight)[7])
        y -= np.outer(data[:, 7], (weight.T if flipped else weight)[7])
        errors.append(float(np.abs(y - expected).mean()))
    assert errors[1] < errors[0] / 3, errors


def test_smoothing_itself_changes_nothing(tmp_path: Path) -> None:
    """Folded into a norm, without any rounding: the weights undo what the norm does."""
    generator = np.random.default_rng(0)
    arrays = {
        "linear.weight": generator.standard_normal((64, 64)).astype(F32),
        "norm.weight": generator.standard_normal(64).astype(F32),
        "norm.bias": generator.standard_normal(64).astype(F32),
    }
    data = generator.standard_normal((4, 64)).astype(F32) * np.logspace(0, 2, 64, dtype=F32)
    graph = BUILDER.prepare(normed("LayerNormalization", "norm.weight", "norm.bias"))
    changes = smoothed(quantize_weights(graph, ()), tmp_path, arrays, data, 0.8)
    assert changes.factors.keys() == arrays.keys()
    # The weights as they are in a graph that quantises nothing.
    factors = changes.factors
    other = {**arrays, "linear.weight": arrays["linear.weight"] * factors["linear.weight"][:, None]}
    other |= {name: arrays[name] * factors[name] for name in ("norm.weight", "norm.bias")}
    outputs = []
    for number, these in enumerate((arrays, other)):
        (tmp_path / str(number)).mkdir()
        outputs.append(run(tmp_path / str(number), graph, these, data, "all")[0])
    np.testing.assert_allclose(*outputs, rtol=1e-4, atol=1e-4)


def test_weights_of_a_file_are_multiplied_before_they_are_rounded(tmp_path: Path) -> None:
    """Norm and linear together, quantised, are near the floats: neither of the two was forgotten."""
    generator = np.random.default_rng(0)
    arrays = {
        "linear.weight": generator.standard_normal((64, 64)).astype(F32),
        "norm.weight": np.logspace(0, 2, 64, dtype=F32),
        "norm.bias": generator.standard_normal(64).astype(F32),
    }
    data = generator.standard_normal((4, 64)).astype(F32)
    plain_graph = BUILDER.prepare(normed("LayerNormalization", "norm.weight", "norm.bias"))
    (tmp_path / "plain").mkdir()
    expected, _ = run(tmp_path / "plain", plain_graph, arrays, data, "all")
    made = quantize_weights(plain_graph, ())
    normalised = (data - data.mean(1, keepdims=True)) / data.std(1, keepdims=True)
    inputs = normalised * arrays["norm.weight"] + arrays["norm.bias"]
    changes = smoothed(made, tmp_path, arrays, inputs.astype(F32), 0.5)
    graph = BUILDER.finish(quantize_activations(made, smooth=True))
    found, _ = run(tmp_path, graph, arrays, data, "all", changes)
    assert 20 * np.log10(np.std(expected) / np.std(found - expected)) > 35


def test_the_peaks_of_three_projections(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    arrays = {f"to_{name}.weight": generator.standard_normal((64, 64)).astype(F32) for name in "qkv"}
    write(tmp_path, arrays, "F32")
    uses = weight_uses(quantize_weights(projections(), ()))
    tensors = find_tensors(uses, read_header(tmp_path / "c.safetensors"), tmp_path)
    peaks = input_peaks(uses, tensors, {"to_q.weight", "to_v.weight"})
    assert peaks.keys() == {"to_q.weight", "to_v.weight"}
    np.testing.assert_array_equal(peaks["to_q.weight"], np.abs(arrays["to_q.weight"]).max(axis=1))
