"""Weights in eight bits: scales for each channel, and integers. Symmetric, from -127 to 127, halves to even."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

LARGEST = 127
CLIPPED = tuple(1 - step / 50 for step in range(21))
"""Shares of a channel's largest magnitude that "mse" tries as the largest that is kept: from all to 0.6 of it."""
AT_ONCE = 1 << 22
"""Elements that are searched at once: "mse" makes several copies of them."""
Scales = Literal["max", "mse"]


def channel_scales(weight: NDArray[Any], axis: int, method: Scales, dtype: np.dtype[Any]) -> NDArray[Any]:
    """A scale for each entry of `axis`, in the float type `dtype`; 1 for a channel that is nothing but zeros.

    "max" keeps the largest magnitude. "mse" takes the scale of least squared error, in its type, among `CLIPPED`.
    """
    rows = _rows(weight, axis)
    parts = np.array_split(rows, max(1, min(len(rows), rows.size // AT_ONCE)))
    return np.concatenate([_row_scales(part, method, dtype) for part in parts])


def _row_scales(rows: NDArray[np.float32], method: Scales, dtype: np.dtype[Any]) -> NDArray[Any]:
    peaks = np.abs(rows).max(axis=1)
    with np.errstate(over="ignore"):
        best = _nonzero((peaks / LARGEST).astype(dtype))
    if method == "mse":
        least = _errors(rows, best)
        for share in CLIPPED[1:]:
            scales = _nonzero((peaks * np.float32(share) / LARGEST).astype(dtype))
            errors = _errors(rows, scales)
            better = errors < least
            best, least = np.where(better, scales, best), np.where(better, errors, least)
    return best


def quantize(weight: NDArray[Any], scales: NDArray[Any], axis: int) -> NDArray[np.int8]:
    """The nearest multiples of the scales, as int8 in the weight's shape."""
    shape = [1] * weight.ndim
    shape[axis] = -1
    steps = np.rint(weight.astype(np.float32) / scales.astype(np.float32).reshape(shape))
    integers: NDArray[np.int8] = np.clip(steps, -LARGEST, LARGEST).astype(np.int8)
    return integers


def _rows(weight: NDArray[Any], axis: int) -> NDArray[np.float32]:
    """One row per channel."""
    moved = np.moveaxis(weight, axis, 0)
    return moved.reshape(moved.shape[0], -1).astype(np.float32)


def _nonzero(scales: NDArray[Any]) -> NDArray[Any]:
    return np.where(scales == 0, np.ones_like(scales), scales)


def _errors(rows: NDArray[np.float32], scales: NDArray[Any]) -> NDArray[np.float32]:
    steps = quantize(rows, scales, 0).astype(np.float32) * scales.astype(np.float32)[:, None]
    errors: NDArray[np.float32] = ((rows - steps) ** 2).sum(axis=1)
    return errors
