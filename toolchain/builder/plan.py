"""recipe + model + device -> ordered steps, each a hit or a miss with the reason; and their execution.

Planning imports neither torch nor diffusers, so that a build with nothing to do takes a fraction of a second.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from toolchain.builder.calibration import CalibrationPlanner
from toolchain.builder.digests import weights_digest
from toolchain.builder.planner import Planner, rounds
from toolchain.builder.quantization import quantize_problems
from toolchain.builder.stages.graph import GRAPH
from toolchain.builder.stages.weights import surveyed
from toolchain.builder.steps import CALIBRATION, Built, Run, Step, StepId, Within
from toolchain.bundle.bundle import PROFILES
from toolchain.engines.backend import Builder
from toolchain.engines.builders import builder_of
from toolchain.engines.runners import runner_of
from toolchain.errors import EngineError, RecipeError, RequestError, SamplerError, UsageError
from toolchain.models import safety
from toolchain.models.component import Family
from toolchain.models.registry import family_of
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe
from toolchain.recipe.options import BackendOptions
from toolchain.sampler.schedulers import entry_for, parse
from toolchain.store.artifacts import Artifact, Store
from toolchain.weights.range_file import RangeFile

log = logging.getLogger("toolchain")


@dataclass(frozen=True)
class Plan:
    """What a build has to do.

    device   what its engines are built for; None where this machine can build none, and `refused` is why
    ungated  why the bundle of a quantised recipe will not be checked; None where it will, or has nothing to check
    ranges   how the ranges came to be that a file gives, as `RangeFile.about`; None without a file
    """

    recipe: Recipe
    source: ModelSource
    family: Family
    backend: Builder[Any]
    store: Store
    steps: tuple[Step, ...]
    _: KW_ONLY
    device: dict[str, Any] | None = None
    refused: EngineError | None = None
    ungated: str | None = None
    ranges: Mapping[str, Any] | None = None

    @property
    def safety_checker(self) -> str | None:
        """What becomes of the model's safety checker: see `models.safety.state`."""
        return safety.state(self.source, self.recipe)

    @property
    def misses(self) -> int:
        """How many steps have to be built."""
        return sum(not step.hit for step in self.steps)

    @property
    def options(self) -> BackendOptions:
        """The backend's table of the recipe."""
        return self.recipe.options(self.backend.name)

    @property
    def quantized(self) -> dict[str, dict[str, Any]]:
        """Component -> which of its weights are quantised, as `Survey.to_json`, as far as graphs are exported."""
        surveys: dict[str, dict[str, Any]] = {}
        for step in self.steps:
            component = step.id.component
            quantize = self.recipe.component(component).quantize if step.stage == "graph" else None
            graph = None if quantize is None or component in surveys else self.artifact(step.id)
            if quantize is not None and graph is not None:
                surveys[component] = surveyed(self.backend, graph.file(GRAPH), quantize)
        return surveys

    @property
    def gate(self) -> Step | None:
        """The step that checks the bundle; None where there is nothing to check, or no way: see `ungated`."""
        return next((step for step in self.steps if step.stage == "gate"), None)

    def step(self, wanted: StepId) -> Step:
        """The step of an id, which must be in the plan."""
        return next(step for step in self.steps if step.id == wanted)

    def artifact(self, wanted: StepId) -> Artifact | None:
        """The artifact of a step; None where it is not built yet, or where the plan has no such step."""
        step = next((step for step in self.steps if step.id == wanted), None)
        return None if step is None else self.store.lookup(step.stage, step.key)


def make_plan(
    recipe: Recipe,
    source: ModelSource,
    store: Store,
    *,
    graphs_only: bool = False,
    calibration: str | Path | None = None,
    gate: bool = True,
) -> Plan:
    """Every step of a build, in order. Raises ModelError, RecipeError and CalibrationError before any work is done.

    A build can be planned where its engines cannot be built: see `Plan.refused`.

    graphs_only  no weights, engines, tables or tokenizer; needs the config files alone
    calibration  a file of ranges, in place of a calibration
    gate         whether the bundle of a quantised recipe is checked before it is put into its place
    """
    family = family_of(source, recipe)
    backend = builder_of(recipe.backend)
    check_recipe(recipe, family, backend, source, graphs_only=graphs_only)
    device, refused = (None, None) if graphs_only else _device(backend)
    if refused is None and not graphs_only:
        _warn(recipe, backend)
    planner = Planner(recipe, source, family, backend, store, device)
    if not graphs_only:
        # Quick to build, and so first: what cannot be compiled here is refused before hours of work.
        planner.tokenizers()
        planner.samplers()
    for component in family.parts(recipe):
        planner.graphs(component)
    check_patterns(recipe, source, family, exported=_exported(planner.steps))
    ranges = None
    if not graphs_only:
        ranges = _add_ranges(planner, calibration)
        for component in family.parts(recipe):
            planner.engines(component)
    ungated = None
    if recipe.quantizes and not graphs_only:
        ungated = _cannot_run(backend, device, refused, recipe) if gate else "it was built with --no-gate"
        if ungated is None:
            planner.gate(timed=all(step.hit for step in unquantized_denoiser(planner)))
    steps = tuple(planner.steps)
    about = None if ranges is None else ranges.about
    plan = Plan(recipe, source, family, backend, store, steps, device=device, refused=refused)
    return replace(plan, ungated=ungated, ranges=about)


def unquantized_denoiser(plan: Plan | Planner) -> list[Step]:
    """The steps of the same denoiser without quantisation, in the first bucket."""
    recipe, denoiser = plan.recipe.unquantized, plan.family.component("denoiser")
    plain = Planner(recipe, plan.source, plan.family, plan.backend, plan.store, plan.device)
    plain.graphs(denoiser)
    plain.engines(denoiser)
    labels = ("", str(recipe.buckets[0]), PROFILES)
    return [step for step in plain.steps if step.id.label in labels]


def _add_ranges(planner: Planner, file: str | Path | None) -> RangeFile | None:
    """The ranges that a recipe needs: of a file, which is returned, or a step that draws them."""
    recipe = planner.recipe
    needed = any(rounds(recipe.component(c.name)) for c in planner.family.parts(recipe))
    if file is not None and not needed:
        raise UsageError("the recipe rounds no activations, and so needs no ranges", where=recipe.name, got=file)
    if file is not None:
        ranges = planner.calibrated(Path(file))
        _warn_of_other_weights(planner, ranges)
        return ranges
    if needed:
        drawn = plan_calibration(recipe, planner.source, planner.store)
        known = {step.key for step in planner.steps}
        # Before hours of export, as a scheduler may have no such number of steps.
        tables = [step for step in drawn.steps if step.stage == "sampler" and step.key not in known]
        ids = [replace(step.id, label=CALIBRATION) for step in tables]
        planner.steps[:0] = [replace(s, id=i, recipe=recipe.name) for s, i in zip(tables, ids, strict=True)]
        planner.calibrate(_as_step(drawn, recipe.name))
    return None


def _warn_of_other_weights(planner: Planner, ranges: RangeFile) -> None:
    parts = [c for c in planner.family.parts(planner.recipe) if rounds(planner.recipe.component(c.name))]
    drawn = ranges.about.get("weights", {})
    own = {c.name: weights_digest(planner.store, planner.source.path / c.folder) for c in parts}
    if any(drawn.get(name) != digest for name, digest in own.items()):
        log.warning("the ranges in %s were drawn with other weights, of %s", ranges.path, ranges.about.get("model"))


def _as_step(calibration: Plan, recipe: str) -> Step:
    """A calibration as one step of a build, which runs all others of it where it has to draw."""
    *before, last = calibration.steps
    draw = last.run
    assert draw is not None

    def run(_: Built, folder: Path, within: Within) -> None:
        def begin(step: Step, what: str) -> None:
            within(str(step.id), None)

        built = execute(replace(calibration, steps=tuple(before)), begin, lambda step, *told: within(*told))
        draw(built, folder, within)

    return replace(last, recipe=recipe, run=run, needs=())


def plan_calibration(recipe: Recipe, source: ModelSource, store: Store) -> Plan:
    """Every step of a calibration, whose artifact is the last step's. Its recipe draws without quantisation.

    Raises ModelError and RecipeError before any work is done, and EngineError where no backend can draw here.
    """
    family = family_of(source, recipe)
    check_recipe(recipe, family, builder_of(recipe.backend), source)
    if recipe.calibration is None:
        raise RecipeError(
            "the recipe says nothing of what to calibrate with",
            where=recipe.name,
            expected='a table [calibration] with prompts like those that you will draw, or prompts = "varied-64"',
            hint="or give the file of a calibration: diffbuild build ... --calibration FILE",
        )
    planner = CalibrationPlanner(recipe, source, family, store)
    planner.plan()
    check_patterns(recipe, source, family, exported=_exported(planner.steps))
    return Plan(planner.recipe, source, family, planner.backend, store, tuple(planner.steps), device=planner.device)


def _warn(recipe: Recipe, backend: Builder[Any]) -> None:
    for name, component in recipe.components.items():
        warning = None if component.quantize is None else backend.warning(component.quantize)
        if warning is not None:
            log.warning("components.%s.quantize: %s", name, warning)


def _device(backend: Builder[Any]) -> tuple[dict[str, Any] | None, EngineError | None]:
    """What engines are built for here, or why none can be."""
    try:
        return backend.device(), None
    except EngineError as error:
        return None, error


def _cannot_run(
    backend: Builder[Any], device: dict[str, Any] | None, refused: EngineError | None, recipe: Recipe
) -> str | None:
    """Why engines that are built here cannot run here, or None."""
    if refused is not None or device is None:
        return f"no engines can be built on this machine: {refused}"
    runner = runner_of(backend.name)
    reason = runner.available() or runner.refuse(device, recipe.options(backend.name))
    return reason and f"its engines cannot run on this machine: {reason}"


def _exported(steps: Iterable[Step]) -> set[str]:
    """The components all of whose graphs are in the store."""
    hits: dict[str, bool] = {}
    for step in steps:
        if step.stage == "graph":
            hits[step.id.component] = hits.get(step.id.component, True) and step.hit
    return {component for component, hit in hits.items() if hit}


def check_patterns(
    recipe: Recipe, source: ModelSource, family: Family, *, exported: Collection[str] = frozenset()
) -> None:
    """RecipeError with every pattern of `keep_float32` and `quantize.exclude` that matches no module; `exported` are
    the components whose graphs are in the store."""
    problems: list[str] = []
    for component in family.parts(recipe):
        precision = recipe.component(component.name)
        if precision.keep_float32 or (precision.quantize and precision.quantize.exclude):
            from toolchain.builder.patterns import pattern_problems

            problems += pattern_problems(component, source, recipe, exported=component.name in exported)
    _refuse(problems, recipe)


def _refuse(problems: Sequence[str], recipe: Recipe) -> None:
    if problems:
        raise RecipeError("the recipe does not fit the model:\n    " + "\n    ".join(problems), where=recipe.name)


def check_recipe(
    recipe: Recipe, family: Family, backend: Builder[Any], source: ModelSource | None, *, graphs_only: bool = False
) -> None:
    """What only family and backend can know of a recipe. Raises RecipeError with every problem.

    source: None where there is no model at hand, whose facts are not looked at then.
    """
    problems = []
    options = recipe.options(backend.name)
    names = [c.name for c in family.parts(recipe)]
    for name, component in recipe.components.items():
        if component.dtype not in backend.dtypes and not graphs_only:
            can = " or ".join(backend.dtypes)
            problems.append(f"components.{name}.dtype: {backend.name} cannot run {component.dtype} (expected {can})")
        elif not graphs_only and (reason := backend.refuses_dtype(component.dtype, options)):
            problems.append(f"components.{name}.dtype: {reason} (expected float32, or another device)")
        if component.quantize is not None:
            refusal = None if graphs_only else backend.refuses_quantized(component.quantize, options)
            problems += [f"components.{name}.quantize: {refusal}"] if refusal else []
            problems += [f"components.{name}.quantize.{why}" for why in quantize_problems(name, component.quantize)]
    if not graphs_only:
        problems += [f"{backend.name}.{problem}" for problem in backend.problems(options)]
    if recipe.safety.checker and family.checker is None:
        problems.append(f"safety.checker: diffusers has no safety checker for family {family.name}")
    optional = [c.name for c in family.components if c.optional]
    for name in recipe.without:
        if name not in optional:
            problems.append(f"without: {name} cannot be left out (expected {' or '.join(optional)})")
    for table, keys in (("components", recipe.components), ("check.components", recipe.check.components)):
        for name in keys:
            if name not in names:
                problems.append(f"{table}.{name}: unknown component (expected one of {', '.join(names)})")
    multiple = family.settings(source).multiple if source else 1
    for bucket in recipe.buckets:
        if bucket.height % multiple or bucket.width % multiple:
            problems.append(f"buckets: {bucket} has sides that are no multiples of {multiple}, as the model needs them")
    config = None if source is None or graphs_only else family.settings(source).scheduler
    specs = dict.fromkeys([recipe.sampling.scheduler, *recipe.sampling.schedulers], "sampling.schedulers")
    if recipe.calibration is not None and recipe.calibration.scheduler:
        specs.setdefault(recipe.calibration.scheduler, "calibration.scheduler")
    for spec, key in specs.items():
        try:
            parsed = parse(spec)
            if config is not None:
                entry_for(parsed, config)
        except (RequestError, SamplerError) as error:
            expected = f"expected {error.expected}, " if isinstance(error, SamplerError) and error.expected else ""
            hint = f"; {error.hint}" if error.hint else ""
            problems.append(f"{key}: {error.what} ({expected}got {spec}){hint}")
    _refuse(problems, recipe)


def execute(
    plan: Plan,
    progress: Callable[[Step, str], None],
    within: Callable[[Step, str, float | None], None] = lambda step, phase, share: None,
) -> dict[StepId, Artifact]:
    """Builds what is missing and returns every artifact by its step, but for the gate's, which needs the bundle.

    `progress` is called with (step, "start" | "built" | "hit"), `within` with how far a long step is. What was built
    before an error or an interruption stays in the store, and the next build goes on from there. What a step reads is
    verified before it runs, since damage in it would go on under a key that says otherwise; a build with nothing to do
    reads no artifact. StoreError; EngineError, before anything is built, where no engine can be built here.
    """
    if plan.refused is not None:
        raise plan.refused
    built: dict[StepId, Artifact] = {}
    sound: set[StepId] = set()
    for step in plan.steps:
        if step.run is None:
            continue
        progress(step, "start")

        def fill(folder: Path, step: Step = step, run: Run = step.run) -> None:
            for needed in step.needs:
                if needed not in sound:
                    built[needed].verify()
                    sound.add(needed)
            run(built, folder, partial(within, step))

        artifact, was_built = plan.store.get_or_build(step.stage, step.subject, step.inputs, fill)
        built[step.id] = artifact
        if was_built:
            sound.add(step.id)
        progress(step, "built" if was_built else "hit")
    return built
