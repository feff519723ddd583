"""How the inputs of layers are rounded: the groups that share a scale, and a calibration's ranges of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.builder.plan import Plan, execute, plan_calibration
from toolchain.builder.stages.calibration import RANGES
from toolchain.builder.stages.graph import GRAPH
from toolchain.precision.activations import Rounded, rounded_activations
from toolchain.precision.changes import Peaks, changes_of
from toolchain.precision.ranges import Ranges
from toolchain.precision.stored import Bits, Form
from toolchain.precision.weight_only import quantize_weights
from toolchain.recipe import Quantize, Recipe
from toolchain.weights.range_file import read_ranges


@dataclass(frozen=True)
class Rounding:
    """Of one layer's input: divided by the factors of smoothing, where there are any, and rounded to the scale."""

    scale: float
    factors: NDArray[np.float32] | None
    bits: Bits


@dataclass(frozen=True)
class Inputs:
    """Of one component.

    plain, smoothed  its activations, without and with smoothing
    key              of the calibration
    """

    plain: tuple[Rounded, ...]
    smoothed: tuple[Rounded, ...]
    ranges: Ranges
    key: str

    def roundings(self, table: Quantize, peaks: Callable[[str], NDArray[np.float32]]) -> dict[str, Rounding]:
        """By the name of the weight, as a weight file would have them. CalibrationError for ranges of no use.

        peaks  of the name of a weight: its largest magnitude for each input
        """
        activations = self.smoothed if table.smoothing else self.plain
        names = {name for a in activations if a.smoothing != "none" for name in a.weights}
        found: Peaks = {name: peaks(name) for name in names}
        changes = changes_of(activations, self.ranges, table.ranges, found, table.smoothing)
        return {
            name: Rounding(float(changes.added[activation.scale]), changes.factors.get(name), activation.bits)
            for activation in activations
            for name in activation.weights
        }


def calibrated(
    plan: Plan, recipe: Recipe, tables: Mapping[str, Quantize], progress: Callable[[str], None]
) -> dict[str, Inputs]:
    """By component, of those whose tables round activations: draws where the store has no calibration yet.

    plan  of the unquantised recipe, whose graphs are in the store
    """
    rounding = {name: table for name, table in tables.items() if table.activations != "none"}
    if not rounding:
        return {}
    calibration = plan_calibration(recipe, plan.source, plan.store)
    last = calibration.steps[-1]

    def within(step: object, phase: str, share: float | None) -> None:
        progress(f"calibration: {phase}")

    built = execute(calibration, lambda step, what: progress(f"calibration: {step.id}"), within)
    ranges = read_ranges(built[last.id].file(RANGES)).components
    return {name: _inputs(plan, name, table, ranges[name], last.key) for name, table in rounding.items()}


def _inputs(plan: Plan, name: str, table: Quantize, ranges: Ranges, key: str) -> Inputs:
    step = next(step for step in plan.steps if step.stage == "graph" and step.id.component == name)
    artifact = plan.artifact(step.id)
    assert artifact is not None
    model = quantize_weights(plan.backend.prepare(ir.load(artifact.file(GRAPH))), table.exclude, Form(table.weights))
    plain, smoothed = (tuple(rounded_activations(model, smooth=smooth)) for smooth in (False, True))
    return Inputs(plain, smoothed, ranges, key)
