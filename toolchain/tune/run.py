"""`diffbuild tune`: measures what each layer costs, searches to the budget, and verifies on whole pictures."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from importlib.metadata import version

from toolchain.builder.plan import Plan, execute, make_plan
from toolchain.check.report import show
from toolchain.engines.builders import usable_dtypes
from toolchain.engines.runners import runner_of
from toolchain.errors import BudgetError, EngineError, UsageError
from toolchain.models.source import ModelSource
from toolchain.recipe import Quantize, Recipe
from toolchain.store.artifacts import Store
from toolchain.tune.budget import EXPECTED, Budget
from toolchain.tune.candidates import Candidates, plain_tables, searched, unquantised, with_tables
from toolchain.tune.inputs import calibrated
from toolchain.tune.kept import Kept
from toolchain.tune.layers import Layers, list_layers
from toolchain.tune.limits import Checked, check, gated
from toolchain.tune.overflow import NARROW, keep_whole, narrow_components
from toolchain.tune.pictures import Drawings, Measured, Request
from toolchain.tune.references import References
from toolchain.tune.result import Overflow, Point, Trial, Tuned
from toolchain.tune.search import Order, Unit, largest_passing, ordered
from toolchain.tune.sensitivity import Sensitivity
from toolchain.tune.writing import with_text

Progress = Callable[[str], None]
TRAJECTORIES = 4
"""Prompts along whose trajectories layers are measured."""
HELD_OUT = 10_000
"""What is added to the seeds for pictures that the search did not see."""
EXPECTED_TABLE = "a table such as [components.denoiser.quantize]"
VERSIONS = ("diffbuild", "torch", "diffusers")


@dataclass(frozen=True)
class Job:
    """What is tuned, and how.

    blocks  whether layers are excluded by blocks
    """

    recipe: Recipe
    source: ModelSource
    store: Store
    budget: Budget
    request: Request
    blocks: bool
    progress: Progress


def tune(job: Job) -> Tuned:
    """The recipe with the largest share quantised that keeps the budget, and no value beyond the range of float16.

    Raises UsageError where nothing can be tuned, EngineError where the engines cannot run here, BudgetError where not
    even the smallest share keeps the budget, and the errors of every stage.
    """
    tables, narrow = searched(job.recipe), narrow_components(job.recipe)
    if not tables and not narrow:
        raise UsageError(
            "the recipe has nothing that could be tuned",
            where=job.recipe.name,
            expected=f'a component with dtype = "{NARROW}", or {EXPECTED_TABLE}',
        )
    if bool(tables) != bool(job.budget.limits):
        if tables:
            what, expected, hint = "no budget is given", EXPECTED, "--budget 'psnr_db>=35'"
        else:
            what, expected = "a budget is given, and the recipe quantises nothing", EXPECTED_TABLE
            hint = f"leave out --budget, and {NARROW} alone is looked after"
        raise UsageError(what, where=job.recipe.name, expected=expected, hint=hint)
    if tables:
        _require_runner(job.recipe)
    tuned = Tuned(
        recipe=job.recipe,
        model=job.source.name,
        backend=job.recipe.backend,
        budget=job.budget.limits,
        prompts=len(job.request.prompts),
        seeds=job.request.seeds,
        versions={name: version(name) for name in VERSIONS},
    )
    if narrow:
        recipe, overflows = _keep_whole(job)
        job, tuned = replace(job, recipe=recipe), replace(tuned, recipe=recipe, overflows=tuple(overflows))
    return with_text(_quantise(job, tuned, tables) if tables else tuned)


def _keep_whole(job: Job) -> tuple[Recipe, list[Overflow]]:
    """Measured anew with every call: it takes as long as a few pictures."""
    plan = make_plan(unquantised(_one_bucket(job.recipe)), job.source, job.store)
    wide = "bfloat16" if "bfloat16" in usable_dtypes(plan.backend, plan.options) else "float32"
    with closing(_references(job, plan)) as references:
        return keep_whole(job.recipe, references, wide, job.progress)


def _references(job: Job, plan: Plan) -> References:
    return References(plan, job.request.prompts[:TRAJECTORIES], job.request.seeds[0], job.progress)


def _one_bucket(recipe: Recipe) -> Recipe:
    """The other buckets have the same weights and layers."""
    return replace(recipe, buckets=recipe.buckets[:1])


def _quantise(job: Job, tuned: Tuned, tables: Mapping[str, Quantize]) -> Tuned:
    kept, recipe = Kept(job.store, job.recipe.name), _one_bucket(job.recipe)
    drawings = Drawings(unquantised(recipe), job.source, kept, job.progress)
    plan = drawings.plan(drawings.reference)
    graphs = tuple(step for step in plan.steps if step.stage == "graph")
    execute(replace(plan, steps=graphs), lambda step, what: job.progress(str(step.id)))
    with closing(_references(job, plan)) as references:
        if "cosine" in job.budget.limits:
            drawings.steps = lambda: references.feeds("denoiser")
        listing = list_layers(plan, tables, references.table.evaluations, blocks=job.blocks)
        if not listing.units:
            raise UsageError(
                "nothing is left that could be quantised",
                where=f"{job.recipe.name}: " + ", ".join(f"components.{name}.quantize" for name in tables),
                expected="layers that are neither excluded nor too small, as `plan` counts them",
            )
        inputs = calibrated(plan, recipe, tables, job.progress)
        sensitivity = Sensitivity(plan, references, inputs, kept, job.progress)
        tables, trials = _choose(sensitivity, tables, listing.units)
        tables = _of_pictures(drawings, recipe, tables, job.request)
        errors = sensitivity.errors(listing.units, tables)
        alone = _alone(drawings, recipe, tables, job.request)
        order = Order(ordered(_units(listing.units, errors, alone)), listing.fixed)
        candidates = Candidates(recipe, tables, order, drawings, job.request)
        chosen, held_out, checked = _search(candidates, job)
        found = replace(tuned, trials=tuple(trials), alone=alone, held_out=held_out)
        return _with_search(found, job, candidates, chosen, checked)


def _require_runner(recipe: Recipe) -> None:
    refused = runner_of(recipe.backend).available()
    if refused:
        raise EngineError(
            "tuning draws pictures with the engines of the recipe, which cannot run here",
            where=recipe.backend,
            got=refused,
            hint="tune on the device that the engines are for, or with a recipe for another backend",
        )


def _choose(
    sensitivity: Sensitivity, tables: Mapping[str, Quantize], units: Sequence[Layers]
) -> tuple[dict[str, Quantize], list[Trial]]:
    """The options of each component, with everything quantised that can be."""
    chosen, trials = {}, []
    for name, table in tables.items():
        weights = [weight for unit in units if unit.component == name for weight in unit.weights]
        chosen[name], tried = sensitivity.choose(name, table, weights)
        trials += tried
    return chosen, trials


def _of_pictures(
    drawings: Drawings, recipe: Recipe, tables: Mapping[str, Quantize], request: Request
) -> dict[str, Quantize]:
    """The options of least error, or the plain ones where those draw better pictures: what clipping does is the same in
    every evaluation and adds up, which errors of single evaluations do not show."""
    errors = {}
    for name, given in (("plain options", plain_tables(tables)), ("options of least error", dict(tables))):
        measured = drawings.measure(with_tables(recipe, given), request, f"everything quantised, {name}")
        errors[name] = (measured.error, given)
    return min(errors.values(), key=lambda pair: pair[0])[1]


def _alone(drawings: Drawings, recipe: Recipe, tables: Mapping[str, Quantize], request: Request) -> dict[str, Measured]:
    """The pictures of each component with nothing else quantised."""
    every = dict.fromkeys(recipe.components)
    return {
        name: drawings.measure(with_tables(recipe, {**every, name: table}), request, f"{name} alone")
        for name, table in tables.items()
    }


def _units(listed: Sequence[Layers], errors: Sequence[float], alone: Mapping[str, Measured]) -> list[Unit]:
    """Errors of different components on one scale: each component's add up to what it does to pictures alone."""
    sums: dict[str, float] = {}
    for unit, error in zip(listed, errors, strict=True):
        sums[unit.component] = sums.get(unit.component, 0.0) + error
    return [
        Unit(u.component, u.pattern, u.macs, u.elements, alone[u.component].error * error / (sums[u.component] or 1.0))
        for u, error in zip(listed, errors, strict=True)
    ]


def _search(candidates: Candidates, job: Job) -> tuple[Point, Measured, Checked]:
    """The candidate of the largest share that keeps the budget, also with seeds that the search did not see, and
    against diffusers' pictures."""

    def passes(excluded: int) -> bool:
        return not job.budget.missed(candidates.point(excluded).measured.summary)

    excluded = largest_passing(candidates.order.points(), passes)
    step, missed = 1, None
    while excluded is not None:
        verified = _verified(candidates, job, excluded)
        if not isinstance(verified, str):
            return candidates.point(excluded), *verified
        missed = f"with {excluded} excluded, {verified}"
        job.progress(missed)
        following, step = min(excluded + step, candidates.order.most_excluded), 2 * step
        excluded = following if following > excluded and passes(following) else None
    raise _too_small(candidates, job, missed)


def _verified(candidates: Candidates, job: Job, excluded: int) -> tuple[Measured, Checked] | str:
    """What a candidate misses with other seeds, or in the recipe's check, where it does not keep the budget there."""
    other = Request(job.request.prompts, tuple((seed + HELD_OUT) % 2**64 for seed in job.request.seeds))
    held_out = candidates.held_out(excluded, other)
    missed = job.budget.missed(held_out.summary)
    if missed:
        return f"and other seeds, {', '.join(missed)}"
    recipe = replace(job.recipe, components=candidates.build(excluded).components)
    checked = check(recipe, job.source, candidates.drawings.kept, job.progress)
    missed = job.budget.missed(checked.summary)
    return f"in the recipe's check, against diffusers, {', '.join(missed)}" if missed else (held_out, checked)


def _too_small(candidates: Candidates, job: Job, missed: str | None) -> BudgetError:
    """missed  what the last candidate misses that keeps the budget with the pictures of the search"""
    first = next(iter(job.budget.limits))
    best = max(candidates.points(), key=lambda point: point.measured.summary[first])
    reached = ", ".join(f"{name} {show(value)}" for name, value in best.measured.summary.items())
    return BudgetError(
        f"the budget cannot be kept with {candidates.order.share(candidates.order.most_excluded):.0%} of the "
        "multiply-accumulates quantised",
        where=job.recipe.name,
        expected=job.budget,
        got=missed or f"{reached} with {best.share:.1%} quantised, the best of {len(candidates.points())} candidates",
        hint="ask for less, or quantise less: exclude more in the recipe, or leave out the table of a component",
    )


def _with_search(tuned: Tuned, job: Job, candidates: Candidates, chosen: Point, checked: Checked) -> Tuned:
    recipe = replace(job.recipe, components=candidates.build(chosen.excluded).components)
    naive = [candidates.naive(excluded) for excluded in dict.fromkeys((0, chosen.excluded))]
    return replace(
        tuned,
        recipe=gated(recipe, checked, job.budget.limits),
        units=tuple(candidates.order.units),
        points=tuple(candidates.points()),
        chosen=chosen,
        naive=tuple(naive),
        reference=candidates.drawings.reference_pixels(job.request),
        reference_step_ms=candidates.drawings.reference_step_ms(job.request),
        least_psnr_db=min(checked.psnr_db),
    )
