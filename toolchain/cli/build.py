"""`diffbuild plan`, `build` and `export`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain import api
from toolchain.builder.steps import RENAMED
from toolchain.cli import progress
from toolchain.cli.console import (
    answer,
    examples,
    json_option,
    model_option,
    origin_options,
    recipe_argument,
    store_option,
    verbosity,
)
from toolchain.cli.document import error_json
from toolchain.cli.text import (
    checker_lines,
    device_line,
    gate_lines,
    megabytes,
    memory_lines,
    quantized_lines,
    ranges_lines,
)
from toolchain.terminal import table

if TYPE_CHECKING:
    from toolchain.builder.plan import Plan
    from toolchain.builder.steps import Step
    from toolchain.bundle.bundle import Bundle

KEYS = ("graph", "weights", "packed", "engines")
"""Inputs of a step that are keys of other steps, which tell by themselves what changed in them."""


calibration_option = click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Ranges that calibrate wrote, in place of a calibration.",
)

gate_option = click.option(
    "--no-gate", "gate", flag_value=False, default=True, help="Do not check what a quantised recipe makes."
)


@click.command(epilog=examples("diffbuild plan sd15-fp32 --model owner/name"))
@recipe_argument
@model_option
@origin_options
@calibration_option
@store_option
@gate_option
@json_option
@verbosity
def plan(recipe: Path, model: str, as_json: bool, **options: Any) -> None:
    """Show what a build would do, and build nothing.

    Each step is a hit, which is in the store, or a miss, with the fields that changed since it was last built.
    """
    planned = api.plan_build(recipe, model, **options)
    answer(as_json, lambda: plan_json(planned), lambda: plan_lines(planned))


@click.command(
    epilog=examples(
        "diffbuild build sd15-fp32 --model owner/name --output bundle",
        "diffbuild build sd15-fp32 --model ./model --output bundle --store /data/store",
    )
)
@recipe_argument
@model_option
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), metavar="BUNDLE", help="The new bundle."
)
@origin_options
@calibration_option
@store_option
@gate_option
@json_option
@verbosity
def build(recipe: Path, model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Build a bundle from a recipe and a model.

    Builds what the store does not hold yet. After an error or an interruption the same command goes on where it
    stopped; a second run is all hits. An older bundle at --output is replaced only when all went well.

    The bundle of a quantised recipe is checked first, by the recipe's own limits. One that misses a limit is left at
    OUTPUT.rejected, and the exit code is 3.
    """
    with progress.steps() as shown:
        bundle = api.build(recipe, model, output, **options, on_plan=shown.begin, progress=shown, within=shown.within)
    answer(as_json, lambda: build_json(bundle, shown), lambda: build_lines(bundle, shown))


@click.command(epilog=examples("diffbuild export sd15-fp32 --model ./model --output graphs"))
@recipe_argument
@model_option
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The new folder.")
@origin_options
@store_option
@json_option
@verbosity
def export(recipe: Path, model: str, output: Path, as_json: bool, **options: Any) -> None:
    """Write the ONNX graphs alone, without weights.

    Needs the model's config files and nothing else. Beside each COMPONENT-BUCKET.onnx lies a .weights.json: which
    tensor of the checkpoint each initializer is.
    """
    with progress.steps() as shown:
        graphs = api.export_graphs(recipe, model, output, **options, on_plan=shown.begin, progress=shown)
    names = [str(graph) for graph in graphs]
    answer(as_json, lambda: {"output": str(output), "graphs": names}, lambda: names)


def plan_json(plan: Plan) -> dict[str, Any]:
    """The document of `plan`."""
    steps = [_step_json(step, plan) for step in plan.steps]
    source = {"name": plan.source.name, "path": str(plan.source.path), "revision": plan.source.revision}
    return {
        "recipe": plan.recipe.name,
        "model": source,
        "store": str(plan.store.root),
        "safety_checker": plan.safety_checker,
        "backend": plan.backend.name,
        "device": plan.device,
        "refused": plan.refused and error_json(plan.refused),
        "steps": steps,
        "quantized": plan.quantized,
        "ungated": plan.ungated,
        "memory": [engine.to_json() for engine in api.plan_memory(plan)],
        "hits": len(plan.steps) - plan.misses,
        "misses": plan.misses,
    }


def _step_json(step: Step, plan: Plan) -> dict[str, Any]:
    known = not (plan.refused and "device" in step.inputs)  # its key depends on a device, which is not known here
    key = step.key if known else None
    return {"stage": step.stage, "subject": step.subject, "key": key, "hit": step.hit, "changed": list(step.reasons)}


def plan_lines(plan: Plan) -> Iterator[str]:
    """What `plan` prints."""
    yield from _heading(plan)
    rows = []
    for step in plan.steps:
        first, *others = [""] if step.hit else _reasons(step, plan)
        rows.append(["hit" if step.hit else "miss", str(step.id), first])
        rows += [["", "", other] for other in others]
    yield from table(rows)
    yield f"{len(plan.steps)} steps: {len(plan.steps) - plan.misses} hits, {plan.misses} misses"
    yield from quantized_lines(plan.quantized)
    if plan.ungated is not None:
        yield f"gate: not run, because {plan.ungated}"
    engines = api.plan_memory(plan)
    if engines:
        yield "memory, of what is built or at least exported:"
    yield from memory_lines(engines)


def _heading(plan: Plan) -> Iterator[str]:
    revision = f" at {plan.source.revision}" if plan.source.revision else ""
    yield f"recipe {plan.recipe.name}, model {plan.source.name}{revision}, store {plan.store.root}"
    if plan.refused:
        yield f"engines by {plan.backend.name} cannot be built here: {plan.refused}"
    if plan.device:
        yield f"engines by {plan.backend.name} for {device_line(plan.device)}"
    yield from checker_lines(plan.safety_checker)
    yield from ranges_lines(plan.ranges)
    renamed = next((change for step in plan.steps for change in step.changed if change.field == RENAMED), None)
    if renamed:
        names = f"{renamed.before} -> {renamed.after}"
        yield f"compared with a recipe of another name, as this one was never built: {names}"


def _reasons(step: Step, plan: Plan) -> list[str]:
    """Why a step is a miss. Changed keys are summed up as "made from new graph, weights"; digests are cut."""
    if plan.refused and "device" in step.inputs:
        return ["cannot be built here"]
    changes = [
        re.sub(r"[0-9a-f]{13,}", lambda digest: digest[0][:12], str(change))
        for change in step.changed
        if change.field not in (RENAMED, *KEYS)
    ]
    inputs = ", ".join(change.field for change in step.changed if change.field in KEYS)
    return changes + ([f"made from new {inputs}"] if inputs else []) or ["not built yet"]


def build_json(bundle: Bundle, shown: progress.Steps) -> dict[str, Any]:
    """The document of `build`."""
    steps = [
        {"stage": f.step.stage, "subject": f.step.subject, "key": f.step.key, "result": f.result, "seconds": f.seconds}
        for f in shown.finished
    ]
    return {
        "bundle": str(bundle.path),
        "bytes": sum(entry.size for entry in bundle.files.values()),
        "buckets": [str(bucket) for bucket in bundle.buckets],
        "safety_checker": bundle.model.get("safety_checker"),
        "gate": bundle.gate,
        "steps": steps,
        "hits": len(steps) - shown.built,
        "built": shown.built,
        "seconds": shown.seconds,
    }


def build_lines(bundle: Bundle, shown: progress.Steps) -> Iterator[str]:
    """What `build` prints when it is done."""
    count, built = len(shown.finished), shown.built
    size = megabytes(sum(entry.size for entry in bundle.files.values()))
    yield f"{bundle.path}: {size}, {count} steps: {built} built, {count - built} hits, {shown.seconds:.1f} s"
    yield from checker_lines(bundle.model.get("safety_checker"))
    yield from ranges_lines(bundle.model.get("ranges"))
    yield from gate_lines(bundle.gate)
    refusal = api.backend_refusal(bundle)
    if refusal is None:
        yield f'next: diffbuild generate {bundle.path} "a prompt" --seed 0'
    else:
        yield f"it does not run here: {refusal}"
        yield f"next: diffbuild inspect {bundle.path}, which says where it does"
