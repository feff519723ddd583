"""Weights in few bits: scales, and the nearest values that they have. Symmetric, without a zero point, halves to even.

int8 goes from -127 to 127, int4 from -8 to 7 and float8 (E4M3) from -448 to 448.
"""

from __future__ import annotations

from math import prod
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from toolchain.precision.stored import Bits, Stored

LARGEST = 127
"""Of int8."""
PEAKS = {"int8": LARGEST, "int4": 7, "float8": 448}
"""What the largest magnitude becomes where nothing is clipped."""
LOWEST = {"int8": -LARGEST, "int4": -8, "float8": -448}
HALF_STEPS = {"int8": 0.5, "int4": 0.5, "float8": 16.0}
"""From the largest value to where the next would begin: what is above is lost."""
CLIPPED = tuple(1 - step / 50 for step in range(21))
"""Shares of the largest magnitude that "mse" tries as the largest that is kept: from all to 0.6 of it."""
AT_ONCE = 1 << 22
"""Elements that are worked on at once: "mse" makes several copies of them."""
FLOAT8 = np.dtype(ml_dtypes.float8_e4m3fn)
Scales = Literal["max", "mse"]


def channel_scales(weight: NDArray[Any], axis: int, method: Scales, dtype: np.dtype[Any]) -> NDArray[Any]:
    """`stored_scales` of a weight in int8, with one for each entry of `axis`."""
    return stored_scales(weight, Stored("int8", weight.shape, axis), method, dtype)


def quantize(weight: NDArray[Any], scales: NDArray[Any], axis: int) -> NDArray[np.int8]:
    """`stored_values` of a weight in int8, with a scale for each entry of `axis`."""
    return stored_values(weight, scales, Stored("int8", weight.shape, axis))


def stored_scales(weight: NDArray[Any], stored: Stored, method: Scales, dtype: np.dtype[Any]) -> NDArray[Any]:
    """The scales of a weight [stored.shape], in the float type `dtype`; 1 where there is nothing but zeros.

    "max" keeps the largest magnitude. "mse" takes the scale of least squared error, in its type, among `CLIPPED`.
    """
    rows = _rows(weight, stored)
    parts = [_row_scales(part, _bits(stored), method, dtype) for part in np.array_split(rows, _parts(rows))]
    return np.ascontiguousarray(_in_place(np.concatenate(parts), stored))


def stored_values(weight: NDArray[Any], scales: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """The nearest values that a weight can have with these scales, as a weight file holds them.

    int8 and the bits of float8 in the weight's shape; int4 as bytes of two, the lower first.
    """
    bits = _bits(stored)
    rows = _rows(weight, stored)
    by_row = _by_row(scales, stored)
    count = _parts(rows)
    parts = zip(np.array_split(rows, count), np.array_split(by_row, count), strict=True)
    steps = np.concatenate([_rounded(part, part_scales, bits) for part, part_scales in parts])
    if stored.kind == "uint4":
        return _packed(steps + 8).reshape(stored.values_shape)
    values = np.ascontiguousarray(_rolled(steps, stored))
    if stored.kind == "int4":
        return _packed(values)
    return values.view(np.uint8) if bits == "float8" else values


def widened(values: NDArray[Any], scales: NDArray[Any], stored: Stored) -> NDArray[np.float32]:
    """The weight that an engine computes with, in float32 [stored.shape]: the inverse of `stored_values`."""
    if stored.kind in ("int4", "uint4"):
        values = np.stack([values & 0xF, values >> 4], axis=-1).astype(np.int8).reshape(stored.shape)
        values = values - 8 if stored.kind == "uint4" else np.where(values > 7, values - 16, values)
    wide = values.view(FLOAT8).astype(np.float32) if stored.kind == "float8" else values.astype(np.float32)
    rows = _rows(wide, stored) * _by_row(scales, stored)[:, None].astype(np.float32)
    return np.ascontiguousarray(_rolled(rows, stored))


def _bits(stored: Stored) -> Bits:
    return "int4" if stored.kind == "uint4" else stored.kind


def _rows(weight: NDArray[Any], stored: Stored) -> NDArray[np.float32]:
    """One row for each scale."""
    if stored.block:
        rows = np.moveaxis(weight, stored.axis, -1).reshape(-1, stored.block)
    else:
        rows = np.moveaxis(weight, stored.axis, 0).reshape(stored.shape[stored.axis], -1)
    return rows.astype(np.float32, copy=False)


def _rolled(rows: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """Rows back in the weight's shape: the inverse of `_rows`."""
    shape = [*stored.shape]
    size = shape.pop(stored.axis)
    if stored.block:
        return np.moveaxis(rows.reshape(*shape, size), -1, stored.axis)
    return np.moveaxis(rows.reshape(size, *shape), 0, stored.axis)


def _in_place(scales: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """One scale per row, in the shape of the weight's scales."""
    if not stored.block:
        return scales
    shape = [*stored.scales_shape]
    blocks = shape.pop(stored.axis)
    return np.moveaxis(scales.reshape(*shape, blocks), -1, stored.axis)


def _by_row(scales: NDArray[Any], stored: Stored) -> NDArray[Any]:
    """The inverse of `_in_place`."""
    return np.moveaxis(scales, stored.axis, -1).reshape(-1) if stored.block else scales


def _parts(rows: NDArray[Any]) -> int:
    return max(1, min(len(rows), prod(rows.shape) // AT_ONCE))


def _row_scales(rows: NDArray[np.float32], bits: Bits, method: Scales, dtype: np.dtype[Any]) -> NDArray[Any]:
    peaks = np.abs(rows).max(axis=1, initial=0)
    best = _typed(peaks / PEAKS[bits], PEAKS[bits], HALF_STEPS[bits], dtype)
    if method == "mse":
        least = _errors(rows, best, bits)
        for share in CLIPPED[1:]:
            scales = _typed(peaks * np.float32(share) / PEAKS[bits], -LOWEST[bits], HALF_STEPS[bits], dtype)
            errors = _errors(rows, scales, bits)
            better = errors < least
            best, least = np.where(better, scales, best), np.where(better, errors, least)
    return best


def _typed(exact: NDArray[np.float32], reach: int, half: float, dtype: np.dtype[Any]) -> NDArray[Any]:
    """Scales in their type, in which `reach` times a scale is finite, and none vanishes where it has few bits left."""
    largest = float(ml_dtypes.finfo(dtype).max)  # type: ignore[no-untyped-call]
    most = np.array(largest / reach).astype(dtype)
    if float(most) * reach > largest:
        most = np.nextafter(most, np.zeros_like(most))
    scales = np.minimum(exact, np.float32(most)).astype(dtype)
    clipped = (scales.astype(np.float32) * (reach + half) < exact * reach) & (scales < most)
    scales = np.where(clipped, np.nextafter(scales, most), scales)
    return np.where(exact == 0, np.ones_like(scales), scales)


def _rounded(rows: NDArray[np.float32], scales: NDArray[Any], bits: Bits) -> NDArray[Any]:
    """The nearest multiples of each row's scale, as int8 or float8."""
    steps = rows / scales.astype(np.float32)[:, None]
    np.clip(steps, LOWEST[bits], PEAKS[bits], out=steps)
    return steps.astype(FLOAT8) if bits == "float8" else np.rint(steps, out=steps).astype(np.int8)


def _errors(rows: NDArray[np.float32], scales: NDArray[Any], bits: Bits) -> NDArray[np.float32]:
    steps = _rounded(rows, scales, bits).astype(np.float32) * scales.astype(np.float32)[:, None]
    errors: NDArray[np.float32] = ((rows - steps) ** 2).sum(axis=1)
    return errors


def _packed(values: NDArray[np.int8]) -> NDArray[np.uint8]:
    """Two values of four bits in each byte, the lower first, as a flat array."""
    pairs = values.view(np.uint8).reshape(-1, 2) & np.uint8(0xF)
    return pairs[:, 0] | (pairs[:, 1] << np.uint8(4))
