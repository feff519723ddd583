"""What a build has to do, component by component: the steps of a plan."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Literal

from toolchain.builder import stages
from toolchain.builder.digests import config_digest
from toolchain.builder.quantization import decisive
from toolchain.builder.stages.calibration import RANGES
from toolchain.builder.stages.graph import GRAPH
from toolchain.builder.steps import (
    CHECK_TOOLS,
    EXPORT_TOOLS,
    RENAMED,
    Built,
    Run,
    Step,
    StepId,
    Within,
    code_digest,
    recipe_of,
    tool_versions,
)
from toolchain.bundle.bundle import ANY, PROFILES
from toolchain.engines.backend import Builder
from toolchain.errors import CalibrationError, EngineError, ExportError
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, ComponentRecipe, Recipe
from toolchain.sampler.schedulers import parse, steps_of
from toolchain.sampler.table import spans
from toolchain.settings import ModelSettings
from toolchain.store.artifacts import Artifact, Json, Store, content_key
from toolchain.store.manifest import Change
from toolchain.store.plain_json import plain
from toolchain.weights.mapped import require_plain
from toolchain.weights.range_file import RangeFile, read_ranges
from toolchain.weights.safetensors import find_weights, read_folder


class Planner:
    """Collects the steps of one plan; a step may use the keys of the steps before it."""

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        family: Family,
        backend: Builder[Any],
        store: Store,
        device: dict[str, Any] | None,
    ) -> None:
        self.recipe, self.source, self.family, self.backend, self.store = recipe, source, family, backend, store
        self.device = device
        self.steps: list[Step] = []
        self._ranges: StepId | Path | None = None
        self.guided = recipe.classifier_free_guidance
        # Entries of CLOSURES: what this family, this backend and its form of a graph decide.
        self._components = f"models.{family.name}_components"
        self._builder, self._preparation = map(_module, (type(backend), backend.prepare))
        self.options = recipe.options(backend.name)

    def add(
        self,
        step: StepId,
        code: Sequence[str],
        inputs: dict[str, Json],
        run: Run | None,
        needs: Sequence[StepId] = (),
    ) -> str:
        """Adds a step and returns its key. `code`: the modules that decide what it writes, as in `code_digest`."""
        inputs = {"code": code_digest(*code), **inputs}
        key = content_key(step.stage, inputs)
        hit = self.store.lookup(step.stage, key) is not None
        changed = () if hit else tuple(self._explain(step, inputs))
        self.steps.append(Step(step, self.recipe.name, key, inputs, hit, changed, run, tuple(needs)))
        return key

    def _explain(self, step: StepId, inputs: dict[str, Json]) -> list[Change]:
        """What changed since this recipe was built; since its twin was, and then its name first, where it never was."""
        # One subject per model and recipe, so that like is compared with like.
        name, twin = self.recipe.name, self._twin
        changes = self.store.explain(step.stage, step.subject(name), inputs, self._known)
        if changes or twin is None:
            return changes
        changes = self.store.explain(step.stage, step.subject(twin), inputs, self._known)
        return [Change(RENAMED, json.dumps(twin), json.dumps(name)), *changes] if changes else []

    @cached_property
    def _known(self) -> list[Artifact]:
        return self.store.by_use()

    @cached_property
    def _twin(self) -> str | None:
        """The recipe of another name that this model was built by last."""
        denoiser = self.family.component("denoiser")
        like = {"family": self.family.name, "component": denoiser.name, "config": self.config(denoiser)}
        graphs = (a for a in self._known if a.stage == "graph" and {k: a.inputs.get(k) for k in like} == like)
        names = (recipe_of(graph, denoiser.name) for graph in graphs)
        return next((name for name in names if name != self.recipe.name), None)

    def config(self, component: Component) -> dict[str, Json]:
        """What of the component's config.json decides its graph."""
        return compiled(self.source.config(component.folder))

    def key(self, step: StepId) -> str:
        """The key of a step that was added before."""
        return next(s.key for s in self.steps if s.id == step)

    def buckets(self, component: Component) -> dict[str, Bucket]:
        """Bucket by its name in artifacts and bundles."""
        if not component.per_bucket:
            return {ANY: self.recipe.buckets[0]}
        return {str(bucket): bucket for bucket in self.recipe.buckets}

    def graphs(self, component: Component) -> None:
        """One step for the graph of each bucket."""
        for label, bucket in self.buckets(component).items():
            spec = component.spec(self.source, bucket, self.recipe)
            inputs: dict[str, Json] = {
                "family": self.family.name,  # whose wrapper it is, around networks that others have too
                "component": component.name,
                "config": self.config(component),
                "signature": spec.to_json(),
                "recipe": _precision(self.recipe.component(component.name)),
                # Of the denoiser alone: a text encoder is the same with and without guidance.
                "guided": self.guided and component.name == "denoiser",
                "tools": tool_versions(EXPORT_TOOLS),
            }

            def run(
                _: Built, folder: Path, within: Within, component: Component = component, bucket: Bucket = bucket
            ) -> None:
                stages.graph.write(component, self.source, self.recipe, bucket, folder)

            self.add(StepId("graph", component.name, label), ("builder.stages.graph", self._components), inputs, run)

    def engines(self, component: Component) -> None:
        """The steps from a component's graphs to its engines. Raises WeightsError for files that cannot be read."""
        shared, labels = self.weights(component), list(self.buckets(component))
        if len(labels) > 1 and self.backend.merges(self.options):
            self.merged(component, labels)
            labels = [PROFILES]
        for label in labels:
            self.backend_step("engine", component, label, shared)

    def weights(self, component: Component) -> dict[str, Json]:
        """The steps from a checkpoint to the weight files that a component's engines share; their keys by role. Raises
        WeightsError for files that cannot be read."""
        folder = self.source.path / component.folder
        files = find_weights(folder)
        first = StepId("graph", component.name, next(iter(self.buckets(component))))
        quantize = self.recipe.component(component.name).quantize
        rounded = rounds(self.recipe.component(component.name))
        inputs: dict[str, Json] = {
            "family": self.family.name,
            "component": component.name,  # both halves of a VAE come from one checkpoint
            "checkpoint": {f.name: self.store.digest_of(f) for f in files},
            "config": self.config(component),
            "recipe": _precision(self.recipe.component(component.name)),
            "quantize": decisive(quantize),
            **({"ranges": self._ranges_key()} if rounded else {}),
            "backend": self.backend.name,
            "tools": tool_versions(EXPORT_TOOLS),
        }

        weights = StepId("weights", component.name)

        def run(built: Built, out: Path, within: Within) -> None:
            with _named(weights):
                ranges = self._read_ranges(built).components[component.name] if rounded else None
                stages.weights.write(self.backend, folder, built[first].file(GRAPH), out, quantize, ranges)

        # The weights that are used, and under which names, is decided by the graphs.
        code = ("builder.stages.weights", self._preparation, "builder.stages.graph", self._components)
        needs = [first, self._ranges] if rounded and isinstance(self._ranges, StepId) else [first]
        shared: dict[str, Json] = {"weights": self.add(weights, code, inputs, run, needs)}
        if not self.steps[-1].hit:
            # Damaged, half-downloaded and foreign files are found now, not after the export.
            require_plain(read_folder(folder), folder)
        if self.backend.packer(self.options) is not None:
            # Made from the first bucket, and so the same for whatever buckets follow it.
            shared["packed"] = self.backend_step("packed", component, first.label, dict(shared))
        return shared

    def calibrate(self, step: Step) -> None:
        """Ranges come from the artifact of a step, which is added."""
        self.steps.append(step)
        self._ranges = step.id

    def calibrated(self, file: Path) -> RangeFile:
        """Ranges come from a file, which is returned. CalibrationError where it is none, or of another model."""
        names = [c.name for c in self.family.parts(self.recipe) if rounds(self.recipe.component(c.name))]
        ranges = read_ranges(file)
        ranges.require_model({n: config_digest(self.config(self.family.component(n))) for n in names})
        self._ranges = file
        return ranges

    def _ranges_key(self) -> Json:
        """Identifies the ranges in the keys of what is made of them."""
        assert self._ranges is not None
        return self.key(self._ranges) if isinstance(self._ranges, StepId) else self.store.digest_of(self._ranges)

    def _read_ranges(self, built: Built) -> RangeFile:
        assert self._ranges is not None
        ranges = self._ranges
        return read_ranges(built[ranges].file(RANGES) if isinstance(ranges, StepId) else ranges)

    def merged(self, component: Component, labels: Sequence[str]) -> None:
        """One graph for the buckets `labels`, from theirs."""
        graphs = [StepId("graph", component.name, label) for label in labels]
        merged = StepId("merged", component.name, PROFILES)
        inputs: dict[str, Json] = {
            "graphs": [self.key(graph) for graph in graphs],
            "tools": tool_versions(("onnx-ir",)),
        }

        def run(built: Built, out: Path, within: Within) -> None:
            with _named(merged):
                stages.merged.write([built[graph].file(GRAPH) for graph in graphs], out / GRAPH)

        self.add(merged, ("builder.stages.merged",), inputs, run, graphs)

    def backend_step(
        self, stage: Literal["packed", "engine", "watched"], component: Component, label: str, shared: dict[str, Json]
    ) -> str:
        """A step of the backend: from one graph and the weight files `shared`, role -> key."""
        graph = StepId("merged" if label == PROFILES else "graph", component.name, label)
        roles: dict[str, StepId] = {"weights": StepId("weights", component.name)}
        if "packed" in shared:
            roles["packed"] = StepId("packed", component.name)
        options: dict[str, Json] = self.recipe.to_json()[self.backend.name]
        inputs: dict[str, Json] = {
            "backend": self.backend.name,
            "device": self.device,
            "options": {k: v for k, v in options.items() if k not in self.backend.run_options},
            **shared,
            "graph": self.key(graph),
        }
        step = StepId(stage, component.name, "" if stage == "packed" else label)

        def run(built: Built, out: Path, within: Within) -> None:
            files = {role: _only_file(built[weights]) for role, weights in roles.items()}
            path = built[graph].file(GRAPH)
            quantize = self.recipe.component(component.name).quantize
            with _named(step):
                if stage == "watched":
                    stages.calibration.write_watched(self.backend, path, files, out, self.options, within)
                elif stage == "packed":
                    stages.engine.write_packed(self.backend, path, files, out, self.options, quantize)
                else:
                    stages.engine.write_engine(self.backend, path, files, out, self.options, quantize, within)

        code = "builder.stages.calibration" if stage == "watched" else "builder.stages.engine"
        return self.add(step, (code, self._builder), inputs, run, [graph, *roles.values()])

    def tokenizers(self) -> None:
        """One step for each tokenizer."""
        for component in self.family.parts(self.recipe):
            if component.tokenizer is None:
                continue
            folder, cls = self.source.path / component.tokenizer, self.source.class_of(component.tokenizer)
            t5 = self.source.class_of(component.folder).startswith("T5")
            ids = component.spec(self.source, self.recipe.buckets[0], self.recipe).input("ids")
            files = sorted(f for f in folder.glob("*") if f.suffix in (".json", ".txt", ".model"))
            inputs: dict[str, Json] = {
                "files": {f.name: _config_in(f) or self.store.digest_of(f) for f in files},
                "class": cls,
                "t5": t5,
                "inversion": self.family.inversion,
                "length": ids.shape[1],
                "tools": tool_versions(("transformers", "tokenizers")),
            }

            write = partial(stages.tokenizer.write, folder, cls, ids.shape[1], t5=t5, inversion=self.family.inversion)

            def run(_: Built, out: Path, within: Within, write: Callable[[Path], None] = write) -> None:
                write(out)

            self.add(StepId("tokenizer", component.tokenizer), ("builder.stages.tokenizer",), inputs, run)

    def samplers(self) -> None:
        """One step for the tables of each scheduler."""
        settings = self.family.settings(self.source)
        by_scheduler: dict[str, dict[int, bool]] = {}
        for text, counts in self.recipe.sampling.tables.items():
            spec = parse(text)
            numbers = by_scheduler.setdefault(spec.canonical, {})
            for steps, asked in counts.items():  # a list of its own has one number of steps, whatever the others have
                number = steps_of(spec, settings.scheduler, steps)
                numbers[number] = numbers.get(number, False) or asked or bool(spec.lists)
        for canonical, counts in by_scheduler.items():
            self.sampler(canonical, counts, settings)

    def sampler(self, spec: str, counts: Mapping[int, bool], settings: ModelSettings) -> None:
        """`counts`: numbers of steps, each with whether it must be there; others are left out where they cannot."""
        sizes = list(dict.fromkeys(settings.tokens(b.height, b.width) for b in self.recipe.buckets))
        schedules = stages.sampler.schedules_of(
            spec, counts, sizes, self.recipe.sampling.strengths, early_start=settings.early_start
        )
        inputs: dict[str, Json] = {
            "scheduler": spec,
            "steps": spans(counts),
            "required": spans(steps for steps, required in counts.items() if required),
            "tokens": [*sizes],
            "strengths": [*self.recipe.sampling.strengths],
            "early_start": settings.early_start,
            "linear_sigmas": settings.linear_sigmas,
            "config": compiled(settings.scheduler),
            "tools": tool_versions(("diffusers", "torch")),
        }

        def run(_: Built, out: Path, within: Within) -> None:
            linear = settings.linear_sigmas
            stages.sampler.write(spec, settings.scheduler, schedules, out, linear_sigmas=linear, progress=within)

        self.add(StepId("sampler", spec), ("builder.stages.sampler",), inputs, run)

    def gate(self, *, timed: bool) -> None:
        """The step that checks the bundle: the last, as everything in it decides what it says. `timed`: whether the
        store has the denoiser without quantisation, to compare times with."""
        recipe = self.recipe.to_json()
        sampling = ("scheduler", "steps", "guidance")
        held = {step.name: step.key for step in self.steps if step.stage in ("tokenizer", "sampler", "engine")}
        inputs: dict[str, Json] = {
            "engines": content_key("bundle", {**held}),
            "device": self.device,
            "options": recipe[self.backend.name],  # also those that change how engines run
            "check": recipe["check"],
            "limits": {c.name: asdict(self.recipe.tolerance(c.name)) for c in self.family.parts(self.recipe)},
            "pictures": {**self.recipe.picture_limits},
            "sampling": {key: recipe["sampling"][key] for key in sampling},
            "guided": self.guided,
            "timed": timed,
            "tools": tool_versions(CHECK_TOOLS),
        }
        self.add(StepId("gate", "bundle"), ("check.gate", self._components), inputs, None)


def _module(code: Any) -> str:
    """Where a class or function is, as in CLOSURES."""
    return str(code.__module__).removeprefix("toolchain.")


def _precision(component: ComponentRecipe) -> dict[str, Json]:
    """What of a component's table decides its graph and weights.

    `tokens` is in the signature where there is such a choice, and in float32 there is nothing to keep.
    """
    kept = sorted(component.keep_float32) if component.dtype != "float32" else []
    return {"dtype": component.dtype, "keep_float32": [*kept]}


def rounds(component: ComponentRecipe) -> bool:
    """Whether activations of a component are rounded, for which their ranges are needed."""
    return component.quantize is not None and component.quantize.activations != "none"


def _config_in(file: Path) -> Json:
    """The settings in a small file of JSON, so that `plan` can name the one that changed; None for any other file."""
    if file.name not in ("tokenizer_config.json", "special_tokens_map.json"):
        return None
    try:
        settings: Json = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None  # told by whoever needs it
    return settings


def compiled(config: Mapping[str, Any]) -> dict[str, Json]:
    """A config without its names and library versions, which change nothing that is compiled."""
    nameless = ("_name_or_path", "_diffusers_version", "transformers_version")
    return {key: plain(value) for key, value in config.items() if key not in nameless}


@contextmanager
def _named(step: StepId) -> Iterator[None]:
    """An error tells which of the recipe's engines it was: a backend knows files alone."""
    try:
        yield
    except (CalibrationError, EngineError, ExportError) as error:
        what = f"{step}: {error.what}"
        kind = type(error)
        raise kind(what, where=error.where, expected=error.expected, got=error.got, hint=error.hint) from error


def _only_file(artifact: Artifact) -> Path:
    (name,) = artifact.files
    return artifact.file(name)
