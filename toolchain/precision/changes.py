"""What rounding activations adds to a weight file, and changes in it: scales, and the factors of smoothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import CalibrationError
from toolchain.precision.activations import Rounded
from toolchain.precision.ranges import Range, Ranges
from toolchain.precision.rounding import PEAKS

FURTHEST = 1e4
"""A channel that hardly fired is not blown up beyond float16."""
Peaks = Mapping[str, NDArray[np.float32]]
"""The largest magnitude of a weight for each of its inputs, by its name in the checkpoint."""


@dataclass(frozen=True)
class Changes:
    """Of a weight file.

    added    tensors that no checkpoint has, by the names of their initializers
    factors  what a weight is multiplied with, by its name in the checkpoint: a number for each of its inputs where it
             is a matrix, and for each element where it is of a norm
    """

    added: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    factors: Mapping[str, NDArray[np.float32]] = field(default_factory=dict)


NONE = Changes()


def check_ranges(activations: Sequence[Rounded], ranges: Ranges, method: str) -> None:
    """CalibrationError with every weight whose activation has no range, or one that is of no use.

    method  as `parse_method` takes it
    """
    problems = []
    for name in (name for activation in activations for name in activation.weights):
        largest = ranges[name].largest(method) if name in ranges else None
        if largest is None:
            problems.append(f"{name}: was not watched")
        elif not isfinite(largest):
            problems.append(f"{name}: its input reached {largest}")
        elif largest <= 0:
            problems.append(f"{name}: its input was never anything but zero")
    if problems:
        shown = problems[:8] + ([f"and {len(problems) - 8} more"] if len(problems) > 8 else [])
        raise CalibrationError(
            "the inputs of weights that are to be multiplied in eight bits have no range:\n    " + "\n    ".join(shown),
            hint="calibrate this model again, or name the modules in quantize.exclude",
        )


def changes_of(activations: Sequence[Rounded], ranges: Ranges, method: str, peaks: Peaks, alpha: float) -> Changes:
    """The values of what `quantize_activations` reads. Raises CalibrationError as `check_ranges`.

    peaks  of the weights of activations with smoothing
    alpha  how much of the magnitude is moved into the weights, 0 to 1
    """
    check_ranges(activations, ranges, method)
    added: dict[str, NDArray[Any]] = {}
    factors: dict[str, NDArray[np.float32]] = {}
    for activation in activations:
        dtype = activation.dtype.numpy()
        seen = [ranges[name] for name in activation.weights]
        largest = max(one.largest(method) for one in seen)
        if activation.smoothing != "none":
            weights = np.max([peaks[name] for name in activation.weights], axis=0)
            _require_channels(activation, _channels(seen), weights)
            inverse = (1 / smoothing(_channels(seen), weights, alpha)).astype(dtype)
            exact = inverse.astype(np.float32)  # as the graph has them, so that the weights undo just that
            if activation.smoothing == "multiplied":
                added[activation.factors] = inverse
            factors |= dict.fromkeys(activation.norm, exact)
            factors |= dict.fromkeys(activation.weights, (1 / exact).astype(np.float32))
            # What a method cuts off the largest magnitude, it cuts off the largest smoothed one.
            largest *= float((_channels(seen) * exact).max() / _channels(seen).max())
        # No smaller than a scale that its type has all bits of.
        least = float(np.finfo(np.float16).tiny) if dtype == np.float16 else float(np.finfo(np.float32).tiny)
        added[activation.scale] = np.array(max(largest / PEAKS[activation.bits], least)).astype(dtype)
    return Changes(added, factors)


def _require_channels(activation: Rounded, seen: NDArray[np.float32], weights: NDArray[np.float32]) -> None:
    if seen.shape != weights.shape:
        raise CalibrationError(
            f"the ranges of {activation.weights[0]}'s input have another number of channels than the weight has inputs",
            expected=len(weights),
            got=len(seen),
            hint="calibrate this model again",
        )


def smoothing(inputs: NDArray[np.float32], weights: NDArray[np.float32], alpha: float) -> NDArray[np.float32]:
    """SmoothQuant's s = inputs ** alpha / weights ** (1 - alpha) for each channel; 1 where one of them is 0, and no
    further from it than `FURTHEST`.

    inputs, weights: the largest magnitudes.
    """
    usable = (inputs > 0) & (weights > 0)
    x, w = (np.where(usable, values, 1).astype(np.float64) for values in (inputs, weights))
    factors: NDArray[np.float32] = np.clip(x**alpha / w ** (1 - alpha), 1 / FURTHEST, FURTHEST).astype(np.float32)
    return factors


def _channels(seen: Sequence[Range]) -> NDArray[np.float32]:
    peaks: NDArray[np.float32] = np.max([one.channels for one in seen], axis=0)
    return peaks
