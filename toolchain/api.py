"""One function for each command of the command line, for use in Python too.

A `recipe` is a Recipe, a file, or the name of one that comes with diffbuild; a `model` is a diffusers folder, a hub id,
or a .safetensors file that holds all of a model, with `config` for what such a file does not say; a `store` that is not
given is $DIFFBUILD_STORE, or ./artifacts. Each function imports what it needs: importing this module is cheap.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import UsageError

if TYPE_CHECKING:
    from toolchain.bench.results import BenchReport
    from toolchain.builder.plan import Plan
    from toolchain.builder.starter import WrittenRecipe
    from toolchain.builder.steps import Step
    from toolchain.bundle.bundle import Bundle
    from toolchain.bundle.forecast import EngineMemory
    from toolchain.bundle.inspection import Inspection
    from toolchain.bundle.signing import Signature, Verdict
    from toolchain.check.report import CheckReport
    from toolchain.recipe import Recipe
    from toolchain.recipe.shipped import ShippedRecipe
    from toolchain.runtime.pictures import SavedPictures
    from toolchain.runtime.progress import Callback
    from toolchain.store.artifacts import Store
    from toolchain.store.upkeep import CleanUp, Listing, StoreVerdict
    from toolchain.trace.timeline import Trace
    from toolchain.weights.range_file import RangeFile

log = logging.getLogger("toolchain")

StepProgress = Callable[["Step", str], None]
"""Called with a step of a build and "start", "built" or "hit"."""
StepShare = Callable[["Step", str, float | None], None]
"""Called with a long step, the name of its phase and how much of that is done, 0 to 1; None where nobody knows."""


def shipped_recipes() -> list[ShippedRecipe]:
    """The recipes that come with diffbuild, by name."""
    from toolchain.recipe import load_recipe, shipped

    return [shipped.ShippedRecipe(load_recipe(Path(name)), shipped.about(name)) for name in shipped.names()]


def write_recipe(
    model: str | Path,
    output: str | Path | None = None,
    *,
    backend: str | None = None,
    revision: str | None = None,
    config: str | Path | None = None,
) -> WrittenRecipe:
    """Writes a first recipe for a model and this machine. Needs the model's config files alone.

    output   None: the model's name, .toml, in the working directory
    backend  None: the fastest that runs here

    Raises ModelError, and UsageError for an output that exists already or cannot be written.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.builder.starter import WrittenRecipe, best_backend, write_starter
    from toolchain.store.files import write_atomic
    from toolchain.store.outputs import check_output

    target = Path(output or f"{Path(model).resolve().name}.toml")
    check_output(target)
    if target.exists():
        raise UsageError("the recipe file exists already", where=target, hint="choose another --output, or delete it")
    source = open_model(model, revision, config=config, weights=False)
    starter = write_starter(source, backend or best_backend(), target.stem)
    write_atomic(target, starter.text.encode())
    return WrittenRecipe(target, starter.recipe, starter.like)


def check_recipe_file(
    recipe: Recipe | str | Path,
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
) -> Recipe:
    """Checks a recipe and returns it; with `model` also whether it fits that, of which the config files are enough.

    Needs no library of the engines. Raises RecipeError with every problem, ModelError and UsageError.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.builder.plan import check_patterns, check_recipe
    from toolchain.engines.builders import builder_of
    from toolchain.models.registry import family_of, named_family

    loaded = _load(recipe)
    safety = loaded.safety.checker
    source = None if model is None else open_model(model, revision, config=config, weights=False, safety=safety)
    family = named_family(loaded.family) if source is None else family_of(source, loaded)
    check_recipe(loaded, family, builder_of(loaded.backend), source)
    if source is not None:
        check_patterns(loaded, source, family)
    return loaded


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

    loaded = _load(recipe)
    log.debug("model %s", model)
    # Graphs of a single file also tell where each weight lies, and for that it is converted.
    weights = not graphs_only or Path(model).expanduser().is_file()
    safety = loaded.safety.checker
    source = open_model(model, revision, config=config, store=store, weights=weights, safety=safety)
    log.debug("planning, with the digests of %s", source.path)
    return make_plan(loaded, source, _store(store), graphs_only=graphs_only, calibration=calibration, gate=gate)


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
        from toolchain.check.gate import require_installed

        require_installed()

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

    return ranges.calibrate(_load(recipe), model, Path(output), _store(store), **options)


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


def generate(
    bundle: str | Path,
    prompts: Sequence[str],
    output: str | Path | None = None,
    *,
    verify: bool = True,
    trust: str | Path | None = None,
    progress: Callback | None = None,
    **options: Any,
) -> SavedPictures:
    """Draws a picture for each prompt and writes it as PNG, with its settings as text.

    output   several pictures become NAME-1.png and so on; None: diffbuild-SEED.png in the working directory
    verify   compare every file of the bundle with its sha256 first
    trust    a public key that must have signed the bundle; $DIFFBUILD_TRUST where it is not given
    options  of a call of `toolchain.Pipeline`; None leaves the choice to the bundle

    To draw more than once, open the bundle with `toolchain.load`. Raises UsageError for the output, BundleError and
    RequestError.
    """
    from toolchain.runtime.pictures import SavedPictures, check_picture_output, draw, save
    from toolchain.runtime.pipeline import load

    target = None if output is None else Path(output)
    check_picture_output(target)
    started = time.perf_counter()
    with closing(load(bundle, verify=verify, trust=trust, warm_up=False, open_buckets=1)) as pipe:
        load_ms = (time.perf_counter() - started) * 1e3
        result, settings = draw(pipe, prompts, options, progress)
    return SavedPictures(save(result, settings, target), result.timings, load_ms)


def check_bundle(
    bundle: str | Path,
    model: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    store: str | Path | None = None,
    report: str | Path | None = None,
    html: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CheckReport:
    """Compares a bundle with the model that it was built from: see `toolchain.check`. A failed gate is a result.

    report, html  files to write the report to as well, as JSON and as a page

    Raises UsageError for outputs that cannot be written, BundleError, ModelError and EngineError.
    """
    from toolchain.builder.open_model import open_model
    from toolchain.bundle.bundle import read_bundle
    from toolchain.bundle.signing import require_trusted
    from toolchain.check.compare import compare
    from toolchain.check.page import save_page
    from toolchain.store.outputs import check_outputs

    check_outputs(report, html)
    opened = read_bundle(bundle)
    require_trusted(opened)
    source = open_model(model, revision, config=config, store=store, safety=opened.recipe.safety.checker)
    compared = compare(opened, source, progress=progress)
    if report is not None:
        compared.save(Path(report))
    if html is not None:
        save_page(Path(html), compared, opened)
    return compared


def bench_bundle(
    bundle: str | Path,
    *,
    html: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> BenchReport:
    """Measures where the time of a picture goes.

    html     a file to write the report to as well, as a page
    options  of `toolchain.bench.run.measure`

    Raises UsageError, BundleError, ModelError, and DiffbuildError for a contender that fails.
    """
    from toolchain.bench.page import page
    from toolchain.bench.run import measure
    from toolchain.store.files import write_atomic
    from toolchain.store.outputs import check_output

    check_output(html)
    measured = measure(Path(bundle), progress, **options)
    if html is not None:
        write_atomic(Path(html), page(measured).encode())
    return measured


def trace_bundle(
    bundle: str | Path, output: str | Path, *, prompt: str | None = None, operators: bool = False, **options: Any
) -> Trace:
    """Records one generation on a timeline and writes it as Chrome's trace events.

    prompt     None: the recipe's first
    operators  profile the operators inside each engine as well; ONNX Runtime on the CPU alone
    options    as in `generate`

    Raises UsageError, BundleError and RequestError.
    """
    from toolchain.bundle.signing import open_bundle
    from toolchain.store.outputs import check_output
    from toolchain.trace.record import trace

    check_output(output)
    opened = open_bundle(Path(bundle))
    chosen = {key: value for key, value in options.items() if value is not None}
    recorded = trace(opened, {"prompt": prompt or opened.recipe.check.prompts[0], **chosen}, operators=operators)
    recorded.save(Path(output))
    return recorded


def inspect_bundle(bundle: str | Path, *, verify: bool = False) -> Inspection:
    """What a bundle holds, and whether it can run here; `verify` compares every file with its sha256.

    Raises BundleError for what is no bundle or, with `verify`, for a damaged one.
    """
    from toolchain.bundle.bundle import read_bundle
    from toolchain.bundle.inspection import Inspection
    from toolchain.engines.runners import runner_of

    opened = read_bundle(bundle)
    if verify:
        opened.verify()
    backend = runner_of(opened.backend)
    refused = backend.available() or backend.refuse(opened.device, opened.recipe.options(opened.backend))
    if refused and (command := backend.install(opened.device)):
        refused += f"; {command}"
    return Inspection(opened, refused, verify)


def backend_refusal(bundle: Bundle) -> str | None:
    """Why the backend of a bundle cannot run on this machine; None where it can."""
    from toolchain.engines.runners import runner_of

    return runner_of(bundle.backend).available()


def sign_bundle(bundle: str | Path, key: str | Path) -> Signature:
    """See `toolchain.bundle.signing.sign_bundle`."""
    from toolchain.bundle import signing

    return signing.sign_bundle(bundle, key)


def verify_bundle(bundle: str | Path, key: str | Path | None = None) -> Verdict:
    """See `toolchain.bundle.signing.verify_bundle`."""
    from toolchain.bundle import signing

    return signing.verify_bundle(bundle, key)


def list_artifacts(store: str | Path | None = None) -> Listing:
    """Every artifact of a store, with its size and its last use. StoreError."""
    from toolchain.store import upkeep

    return upkeep.list_artifacts(_store(store))


def verify_store(store: str | Path | None = None, *, quarantine: bool = False) -> StoreVerdict:
    """Reads every byte of a store; `quarantine` moves damaged artifacts aside. StoreError."""
    from toolchain.store import upkeep

    return upkeep.verify(_store(store), quarantine=quarantine)


def clean_store(store: str | Path | None = None, *, dry_run: bool = False, min_age_s: float = 3600) -> CleanUp:
    """Removes artifacts that no bundle was built from: see `Store.gc`. StoreError."""
    from toolchain.store import upkeep

    return upkeep.clean(_store(store), dry_run=dry_run, min_age_s=min_age_s)


def examine_machine(store: str | Path | None = None) -> dict[str, Any]:
    """What this machine can do, as `diffbuild doctor --json` prints it; `works` is whether a backend can run here."""
    from toolchain.engines.machine import examine
    from toolchain.store.artifacts import default_store

    return examine(Path(store or default_store()))


def _load(recipe: Recipe | str | Path) -> Recipe:
    from toolchain.recipe import Recipe, load_recipe

    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def _store(store: str | Path | None) -> Store:
    from toolchain.store.artifacts import Store, default_store

    return Store(Path(store or default_store()))
