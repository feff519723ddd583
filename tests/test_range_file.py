"""Ranges as a file: what is written is read, and what every damaged file says."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.errors import CalibrationError
from toolchain.precision.ranges import Range, Ranges, histogram
from toolchain.weights.mapped import read_metadata
from toolchain.weights.range_file import FORMAT_KEY, PARTS, read_ranges, write_ranges
from toolchain.weights.safetensors import write_safetensors

ABOUT = {"model": "a model", "configs": {"denoiser": "d1", "vae_decoder": "d2"}}


def seen(seed: int, channels: int = 4, steps: int = 3) -> Range:
    values = np.abs(np.random.default_rng(seed).standard_normal((steps, channels))).astype(np.float32)
    return Range(values, values.max(axis=1), histogram(values))


def components() -> dict[str, Ranges]:
    query = seen(0)
    denoiser = {"q.weight": query, "k.weight": query, "out.weight": seen(1, 6)}
    return {"denoiser": denoiser, "vae_decoder": {"conv.weight": seen(2, 3, 1)}}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    write_ranges(tmp_path / "ranges.safetensors", components(), ABOUT)
    return tmp_path / "ranges.safetensors"


def test_what_is_written_is_read(file: Path) -> None:
    found = read_ranges(file)
    assert found.about == ABOUT
    for component, ranges in components().items():
        assert found.components[component].keys() == ranges.keys()
        for name, expected in ranges.items():
            for part in PARTS:
                np.testing.assert_array_equal(getattr(found.components[component][name], part), getattr(expected, part))
    denoiser = found.components["denoiser"]
    assert denoiser["q.weight"] is denoiser["k.weight"]
    assert denoiser["q.weight"].largest("max") == components()["denoiser"]["q.weight"].largest("max")


def test_the_same_ranges_are_the_same_bytes(file: Path, tmp_path: Path) -> None:
    write_ranges(tmp_path / "again", components(), ABOUT)
    assert (tmp_path / "again").read_bytes() == file.read_bytes()


def test_safetensors_itself_reads_it(file: Path) -> None:
    from safetensors import safe_open

    with safe_open(file, "np") as opened:
        assert sorted(opened.keys())[:3] == [
            "denoiser/out.weight.counts",
            "denoiser/out.weight.means",
            "denoiser/out.weight.peaks",
        ]
        assert json.loads(opened.metadata()["about"]) == ABOUT


def rewritten(path: Path, change: Callable[[dict[str, np.ndarray], dict[str, str]], None]) -> None:
    """The file with other tensors, or other metadata."""
    from safetensors.numpy import load_file

    tensors, metadata = load_file(path), read_metadata(path)
    change(tensors, metadata)
    kinds = {"float32": "F32", "int64": "I64", "float64": "F64"}
    listed = [(name, kinds[str(array.dtype)], array.shape) for name, array in tensors.items()]
    write_safetensors(path, listed, lambda name: tensors[name], metadata)


def put(name: str, value: Any) -> Callable[[dict[str, np.ndarray], dict[str, str]], None]:
    def change(tensors: dict[str, np.ndarray], _: dict[str, str]) -> None:
        tensors[name] = value(tensors[name])

    return change


def with_value(value: float, at: int = 1) -> Callable[[np.ndarray], np.ndarray]:
    def put_in(array: np.ndarray) -> np.ndarray:
        changed = array.copy()
        changed.ravel()[at] = value
        return changed

    return put_in


OUT = "denoiser/out.weight"
WRONG = {
    "a tensor is missing": (lambda t, _: t.pop(f"{OUT}.means"), f"{OUT}.means: missing"),
    "NaN": (put(f"{OUT}.peaks", with_value(np.nan)), f"{OUT}.peaks: infinite or NaN"),
    "infinite": (put(f"{OUT}.means", with_value(np.inf)), f"{OUT}.means: infinite or NaN"),
    "negative": (put(f"{OUT}.peaks", with_value(-1)), f"{OUT}.peaks: negative"),
    "negative counts": (put(f"{OUT}.counts", with_value(-1)), f"{OUT}.counts: negative"),
    "another rank": (put(f"{OUT}.peaks", np.ravel), f"{OUT}.peaks: not of such a shape or type: F32 [18]"),
    "another length": (put(f"{OUT}.means", lambda a: a[:2]), f"{OUT}.means: not of such a shape or type: F32 [2]"),
    "other bins": (put(f"{OUT}.counts", lambda a: a[:9]), f"{OUT}.counts: not of such a shape or type: I64 [9]"),
    "another type": (put(f"{OUT}.means", np.float64), f"{OUT}.means: not of such a shape or type: F64 [3]"),
    "no steps": (put(f"{OUT}.peaks", lambda a: a[:0]), f"{OUT}.peaks: not of such a shape or type: F32 [0, 6]"),
    "no metadata": (lambda _, m: m.clear(), "the file is no calibration\n"),
    "a newer one": (lambda _, m: m.update({FORMAT_KEY: "2"}), "the file is no calibration of this version"),
    "no activations": (lambda _, m: m.pop("activations"), "the calibration's metadata are damaged"),
    "no JSON": (lambda _, m: m.update(activations="{"), "the calibration's metadata are damaged"),
    "no lists": (lambda _, m: m.update(activations='{"denoiser": 3}'), "the calibration's metadata are damaged"),
    "empty lists": (lambda _, m: m.update(activations='{"denoiser": [[]]}'), "the calibration's metadata are damaged"),
    "nothing about it": (lambda _, m: m.update(about="{}"), "the calibration's metadata are damaged"),
    "no configs": (lambda _, m: m.update(about='{"configs": 1}'), "the calibration's metadata are damaged"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_file(case: str, file: Path) -> None:
    change, expected = WRONG[case]
    rewritten(file, change)  # type: ignore[arg-type]
    with pytest.raises(CalibrationError) as caught:
        read_ranges(file)
    assert expected in str(caught.value)
    assert str(file) in str(caught.value)
    assert "hint: diffbuild calibrate" in str(caught.value)


def test_all_problems_at_once(file: Path) -> None:
    def change(tensors: dict[str, np.ndarray], _: dict[str, str]) -> None:
        tensors[f"{OUT}.peaks"] *= -1
        del tensors["vae_decoder/conv.weight.counts"]

    rewritten(file, change)
    with pytest.raises(CalibrationError, match=r"peaks: negative\n.*conv\.weight\.counts: missing"):
        read_ranges(file)


@pytest.mark.parametrize(
    ("damage", "got"),
    [
        (lambda data: data[:-100], "a tensor lies beyond the end of the file"),
        (lambda data: data[:40], "the weight file is truncated, or not a safetensors file"),
        (lambda data: b"", "the weight file is truncated, or not a safetensors file"),
        (lambda data: b"prompt: a cat\n" * 9, "the weight file is truncated, or not a safetensors file"),
    ],
)
def test_a_truncated_file(damage: Callable[[bytes], bytes], got: str, file: Path) -> None:
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(CalibrationError) as caught:
        read_ranges(file)
    assert str(caught.value).startswith("the calibration cannot be read\n")
    assert f"got: {got}" in str(caught.value)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"there is no such calibration file(.|\n)*no-such-file"):
        read_ranges(tmp_path / "no-such-file")


def test_another_model(file: Path) -> None:
    found = read_ranges(file)
    found.require_model({"denoiser": "d1"})
    with pytest.raises(CalibrationError, match=r"another model: the config of denoiser differs(.|\n)*of a model"):
        found.require_model({"denoiser": "d0", "vae_decoder": "d2"})
    with pytest.raises(CalibrationError, match=r"no ranges of a component(.|\n)*expected: text_encoder"):
        found.require_model({"text_encoder": "d0"})
