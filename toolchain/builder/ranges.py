"""Ranges of activations as a file, for another machine that builds."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain.builder.open_model import open_model
from toolchain.builder.plan import Plan, execute, plan_calibration
from toolchain.builder.stages.calibration import RANGES
from toolchain.builder.steps import Step
from toolchain.errors import CalibrationError, UsageError
from toolchain.recipe import Recipe
from toolchain.store.artifacts import Store, write_atomic
from toolchain.store.outputs import check_output
from toolchain.weights.range_file import RangeFile, read_ranges


def calibrate(
    recipe: Recipe,
    model: str | Path,
    output: Path,
    store: Store,
    *,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    progress: Callable[[Step, str], None] = lambda step, what: None,
    within: Callable[[Step, str, float | None], None] = lambda step, phase, share: None,
    **origin: Any,
) -> RangeFile:
    """Plans a calibration, builds what the store lacks of it and writes its ranges to `output`.

    `origin`: revision and config, as in `open_model`. Raises UsageError for an output that cannot be
    written, before any work is done, what `plan_calibration` raises, and the errors of every stage.
    """
    check_output(output)
    _require_replaceable(output)
    plan = plan_calibration(recipe, open_model(model, store=store.root, **origin), store)
    on_plan(plan)
    calibrated = execute(plan, progress, within)[plan.steps[-1].id]
    calibrated.verify()
    write_atomic(output, calibrated.file(RANGES).read_bytes())
    return read_ranges(output)


def _require_replaceable(output: Path) -> None:
    """UsageError for a file that is something else, such as the recipe itself."""
    if output.exists():
        try:
            read_ranges(output)
        except CalibrationError as error:
            raise UsageError(
                "the output is a file of another kind, which would be lost",
                where=output,
                expected="a new file, or a calibration to replace",
                got=error.what,
                hint="choose another --output, or delete it",
            ) from error
