"""Commands that plan and build."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.api.arguments import load, open_store

if TYPE_CHECKING:
    from toolchain.builder.plan import Plan
    from toolchain.builder.steps import Step
    from toolchain.bundle.bundle import Bundle
    from toolchain.bundle.forecast import EngineMemory
    from toolchain.recipe import Recipe
    from toolchain.weights.range_file import RangeFile

log = logging.getLogger("toolchain")

StepProgress = Callable[["Step", str], None]
"""Called with a step of a build and "start", "built" or "hit"."""
StepShare = Callable[["Step", str, float | None], None]
"""Called with a long step, the name of its phase and how much of that is done, 0 to 1; None where nobody knows."""


def plan_build(
    recipe: Recipe | str | Path,
    model: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    store: str | Path | None = None,
    graphs_only: bool = False,
    calibration: str | Path | None = None,
    gate: bool = True,
) -> Plan:
    """What a build would do: every step, hit or miss, and the field that changed.

    `calibration` is a file that `calibrate` wrote, in place of a calibration. Needs no engine library but for that.
    Raises RecipeError, ModelError, WeightsError, CalibrationError, UsageError, and EngineError of a calibration.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.builder.plan import make_plan

    loaded = load(recipe)
    log.debug("model %s", model)
    # Graphs of a single file also tell where each weight lies, and for that it is converted.
    weights = not graphs_only or Path(model).expanduser().is_file()
    safety = loaded.safety.checker
    source = open_model(model, revision, config=config, store=store, weights=weights, safety=safety)
    log.debug("planning, with the digests of %s", source.path)
    return make_plan(loaded, source, open_store(store), graphs_only=graphs_only, calibration=calibration, gate=gate)


def plan_memory(plan: Plan) -> list[EngineMemory]:
    """What the engines of a plan will take, as far as they are built, or at least exported."""
    from toolchain.builder.forecast import planned

    return planned(plan)


def build(
    recipe: Recipe | str | Path,
    model: str | Path,
    output: str | Path,
    *,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    progress: StepProgress = lambda step, what: None,
    within: StepShare = lambda step, phase, share: None,
    **options: Any,
) -> Bundle:
    """Builds what the store lacks and writes a bundle.

    `options` are those of `plan_build`; `on_plan` is called once, before the first step. With `gate` the bundle of a
    quantised recipe is checked first, and one that misses a limit is left at OUTPUT.rejected. Raises UsageError for an
    output that cannot be written, what `plan_build` raises, the errors of every stage, and GateError.
    """
    from toolchain.builder.assemble import assemble, check_output

    check_output(Path(output))
    plan = plan_build(recipe, model, **options)
    on_plan(plan)
    if plan.gate is not None and not plan.gate.hit:
        from toolchain.check.gate import require_possible

        require_possible(plan.source, plan.recipe)

    def gate_check(*arguments: Any) -> Mapping[str, Any]:
        from toolchain.check.gate import check_gate

        return check_gate(*arguments)

    return assemble(plan, Path(output), gate_check, progress, within)


def calibrate(
    recipe: Recipe | str | Path,
    model: str | Path,
    output: str | Path,
    *,
    store: str | Path | None = None,
    **options: Any,
) -> RangeFile:
    """Draws what the recipe says in `calibration` and writes the ranges of the activations to a file. `options` are
    those of `build`. Raises what `build` does, and EngineError where nothing can draw here."""
    from toolchain.builder import ranges

    return ranges.calibrate(load(recipe), model, Path(output), open_store(store), **options)


def export_graphs(
    recipe: Recipe | str | Path,
    model: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    store: str | Path | None = None,
    on_plan: Callable[[Plan], None] = lambda plan: None,
    progress: StepProgress = lambda step, what: None,
) -> list[Path]:
    """Writes the graphs alone, without weights, which need not be there. Returns their paths.

    See `toolchain.builder.graphs.write_graphs`. Raises what `plan_build` raises, ExportError and StoreError.
    """
    from toolchain.builder.graphs import write_graphs

    plan = plan_build(recipe, model, revision=revision, config=config, store=store, graphs_only=True)
    on_plan(plan)
    return write_graphs(plan, Path(output), progress)
