"""Errors of layers, of blocks and of options, each measured alone on the reference's own trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, replace
from typing import Any

from toolchain.builder.plan import Plan
from toolchain.recipe import Quantize
from toolchain.store.artifacts import Json
from toolchain.tune.inputs import Inputs
from toolchain.tune.kept import Kept
from toolchain.tune.layers import Layers
from toolchain.tune.references import References
from toolchain.tune.result import Trial

CHOICES: Mapping[str, tuple[Any, ...]] = {
    "ranges": ("max", "mean", "percentile=99.99", "percentile=99.9", "first_steps=0.5"),
    "smoothing": (0.0, 0.5, 0.8),
    "scales": ("max", "mse"),
}
"""Key of a quantize table -> the values that are tried, with everything quantised."""
OF_ACTIVATIONS = ("ranges", "smoothing")


class Sensitivity:
    """Measures once, and loads a model only where something is missing.

    plan    of the unquantised recipe, which knows the model's files
    inputs  by component, of those whose activations are rounded
    """

    def __init__(
        self,
        plan: Plan,
        references: References,
        inputs: Mapping[str, Inputs],
        kept: Kept,
        progress: Callable[[str], None],
    ) -> None:
        self.plan, self.references, self.inputs = plan, references, inputs
        self.kept, self.progress = kept, progress

    def choose(self, name: str, table: Quantize, weights: Iterable[str]) -> tuple[Quantize, list[Trial]]:
        """The table with the options of least error, one key after the other, and what was tried."""
        names, trials = tuple(weights), []
        for key, values in CHOICES.items():
            if key in OF_ACTIVATIONS and table.activations == "none":
                continue
            errors = {}
            for value in values:
                self.progress(f"{name}: {key} = {value} with everything quantised")
                errors[value] = self.error(name, replace(table, **{key: value}), names)
                trials.append(Trial(name, key, value, errors[value]))
            table = replace(table, **{key: min(errors, key=lambda value: errors[value])})
        return table, trials

    def errors(self, units: Iterable[Layers], tables: Mapping[str, Quantize]) -> list[float]:
        """Of each unit, when it alone is quantised."""
        listed = list(units)
        errors = []
        for number, unit in enumerate(listed):
            self.progress(f"error of layer {number + 1} of {len(listed)}, {unit.component} {unit.pattern}")
            errors.append(self.error(unit.component, tables[unit.component], unit.weights))
        return errors

    def error(self, name: str, table: Quantize, weights: tuple[str, ...]) -> float:
        """Noise over signal of a component's output with these weights quantised."""
        dtype, rounding = self.plan.recipe.component(name).dtype, self.inputs.get(name)
        options: dict[str, Json] = asdict(replace(table, exclude=()))
        inputs: dict[str, Json] = {**self._inputs(), "component": name, "weights": [*weights], "quantize": options}
        inputs |= {} if rounding is None else {"calibration": rounding.key}

        def measure() -> float:
            return self.references.simulation(name).error(weights, table, dtype, rounding)

        return self.kept.number(f"error {name}", {**inputs, "dtype": dtype}, measure)

    def _inputs(self) -> dict[str, Json]:
        """What the inputs of all components are made of."""
        sampling = self.plan.recipe.sampling
        weights = [step for step in self.plan.steps if step.stage == "weights"]
        tokenizers: list[Json] = [step.key for step in self.plan.steps if step.stage == "tokenizer"]
        return {
            "checkpoints": {step.id.component: step.inputs["checkpoint"] for step in weights},
            "configs": {step.id.component: step.inputs["config"] for step in weights},
            "tokenizers": tokenizers,
            "bucket": str(self.plan.recipe.buckets[0]),
            "prompts": [*self.references.prompts],
            "seed": self.references.seed,
            "sampling": [sampling.scheduler, sampling.steps, sampling.guidance],
        }
