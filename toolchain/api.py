"""The build side of the Python interface: one function per command of the command line."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.builder.open_model import open_model
from toolchain.builder.plan import Plan, check_recipe, execute, make_plan
from toolchain.builder.stages.graph import GRAPH
from toolchain.builder.steps import Step
from toolchain.bundle.bundle import Bundle
from toolchain.engines.registry import backend_of
from toolchain.models.registry import family_of, named_family
from toolchain.recipe import Recipe, load_recipe
from toolchain.store.artifacts import Store, default_store, publish_folder
from toolchain.store.plain_json import encode

if TYPE_CHECKING:
    from toolchain.check.report import CheckReport

log = logging.getLogger("toolchain")

Progress = Callable[[Step, str], None]


def _recipe(recipe: Recipe | str | Path) -> Recipe:
    return recipe if isinstance(recipe, Recipe) else load_recipe(recipe)


def check_recipe_file(
    recipe: Recipe | str | Path,
    model: str | Path | None = None,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
) -> Recipe:
    """The recipe, after all that can be held against it without its engines' library: with `model` also whether it fits
    that, of which the config files are enough. Raises RecipeError with every problem, ModelError and UsageError."""
    found = _recipe(recipe)
    wanted = found.safety.checker
    source = None if model is None else open_model(model, revision, config=config, weights=False, safety=wanted)
    family = named_family(found.family) if source is None else family_of(source, found)
    check_recipe(found, family, backend_of(found.backend), source)
    return found


def plan_build(
    recipe: Recipe | str | Path,
    model: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    store: str | Path | None = None,
    graphs_only: bool = False,
) -> Plan:
    """What a build would do: every step, hit or miss, and the field that changed.

    `recipe` is a Recipe, a file, or the name of one that comes with diffbuild. Needs no library of the engines'.
    """
    found = _recipe(recipe)
    log.debug("model %s", model)
    # Of one file even the graphs tell where each weight lies, and for that it is converted.
    weights, wanted = not graphs_only or Path(model).is_file(), found.safety.checker
    source = open_model(model, revision, config=config, store=store, weights=weights, safety=wanted)
    log.debug("planning, with the digests of %s", source.path)
    return make_plan(found, source, Store(Path(store or default_store())), graphs_only=graphs_only)


def build(
    recipe: Recipe | str | Path,
    model: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    store: str | Path | None = None,
    progress: Progress = lambda step, what: None,
) -> Bundle:
    """Builds what the store lacks and writes a bundle.

    `model` is a diffusers folder, a hub id, or a .safetensors file that holds all of a model, with `config` for what
    the file does not say: see `toolchain.builder.open_model.open_model`.
    """
    from toolchain.builder.assemble import assemble, check_output

    check_output(Path(output))
    return assemble(plan_build(recipe, model, revision=revision, config=config, store=store), Path(output), progress)


def export_graphs(
    recipe: Recipe | str | Path,
    model: str | Path,
    output: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    store: str | Path | None = None,
    progress: Progress = lambda step, what: None,
) -> list[Path]:
    """Writes the graphs alone; needs no weights on disk.

    Beside every `COMPONENT-BUCKET.onnx` lies a `.weights.json`: which checkpoint tensor each initializer is, and, where
    the checkpoint is there, in which file, at which offset and how long. Returns the graphs.
    """
    import onnx_ir as ir

    from toolchain.weights.derived import find_tensors, weight_uses
    from toolchain.weights.safetensors import read_folder

    plan_ = plan_build(recipe, model, revision=revision, config=config, store=store, graphs_only=True)
    folders = {c.name: plan_.source.path / c.folder for c in plan_.family.components}
    # Read now, so that a damaged file is found before the graphs are built and not after.
    checkpoints = {name: read_folder(f) for name, f in folders.items() if plan_.source.has_weights(f.name)}
    built = execute(plan_, progress)
    names: list[str] = []

    def fill(folder: Path) -> None:
        for step in plan_.steps:
            component = step.id.component
            graph = built[step.id].file(GRAPH)
            name = f"{component}-{step.id.label}"
            (folder / f"{name}.onnx").write_bytes(graph.read_bytes())
            uses = weight_uses(ir.load(graph))
            checkpoint = checkpoints.get(component)
            tensors = find_tensors(uses, checkpoint, folders[component]) if checkpoint is not None else {}
            places = {k: {"file": str(t.file), "offset": t.offset, "nbytes": t.nbytes} for k, t in tensors.items()}
            entries = [{**asdict(use), **places.get(use.name, {})} for use in uses]
            (folder / f"{name}.weights.json").write_text(encode(entries))
            names.append(f"{name}.onnx")

    publish_folder(Path(output), fill, owns=lambda name: "/" not in name and name.endswith((".onnx", ".weights.json")))
    return [Path(output) / name for name in names]


def check_bundle(
    bundle: str | Path,
    model: str | Path,
    *,
    revision: str | None = None,
    config: str | Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CheckReport:
    """Compares a bundle with the model that it was built from. See `toolchain.check`."""
    from toolchain.bundle.bundle import read_bundle
    from toolchain.bundle.signing import require_trusted
    from toolchain.check.compare import compare

    found = read_bundle(bundle)
    require_trusted(found)
    source = open_model(model, revision, config=config, safety=found.recipe.safety.checker)
    return compare(found, source, progress=progress)
