"""What a build has to do, component by component: the steps of a plan."""

from __future__ import annotations

import itertools
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.builder.steps import EXPORT_TOOLS, Built, Step, Within, code_digest, tool_versions
from toolchain.bundle.bundle import ANY, PROFILES
from toolchain.engines.backend import Backend
from toolchain.errors import EngineError, ExportError, RequestError, SamplerError
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, ComponentRecipe, Recipe
from toolchain.sampler.schedulers import parse, steps_of
from toolchain.sampler.table import spans, table_name
from toolchain.settings import ModelSettings
from toolchain.store.artifacts import Artifact, Json, Store, content_key
from toolchain.weights.mapped import require_plain
from toolchain.weights.safetensors import find_weights, read_folder

if TYPE_CHECKING:
    import onnx_ir as ir

GRAPH = "graph.onnx"
TABLES = "tables.json"
log = logging.getLogger("toolchain")


class Planner:
    """Collects the steps of one plan; a step may use the keys of the steps before it."""

    def __init__(
        self,
        recipe: Recipe,
        source: ModelSource,
        family: Family,
        backend: Backend,
        store: Store,
        device: dict[str, Any] | None,
    ) -> None:
        self.recipe, self.source, self.family, self.backend, self.store = recipe, source, family, backend, store
        self.device = device
        self.steps: list[Step] = []
        self.guided = recipe.classifier_free_guidance
        self.options: dict[str, Any] = recipe.to_json()[backend.name]

    def add(
        self,
        stage: str,
        subject: str,
        inputs: dict[str, Json],
        run: Callable[[Built, Path, Within], None],
        needs: Sequence[str] = (),
    ) -> str:
        inputs = {"code": code_digest(stage), **inputs}
        key = content_key(stage, inputs)
        hit = self.store.lookup(stage, key) is not None
        changed = [] if hit else self._explain(stage, subject, inputs)
        name = f"{self.recipe.name} {subject}"
        self.steps.append(Step(stage, name, key, inputs, hit, tuple(changed), run, tuple(needs)))
        return key

    def _explain(self, stage: str, subject: str, inputs: dict[str, Json]) -> list[str]:
        """What changed since this recipe was built; since its twin was, and then its name first, where it never was."""
        # One subject per model and recipe, so that like is compared with like.
        own, twin = self.recipe.name, self._twin
        found = self.store.explain(stage, f"{own} {subject}", inputs, self._known)
        if found or twin is None:
            return found
        found = self.store.explain(stage, f"{twin} {subject}", inputs, self._known)
        return [f"recipe.name: {json.dumps(twin)} -> {json.dumps(own)}", *found] if found else []

    @cached_property
    def _known(self) -> list[Artifact]:
        return self.store.by_use()

    @cached_property
    def _twin(self) -> str | None:
        """The recipe of another name that this model was built by last."""
        denoiser = self.family.component("denoiser")
        like = {"family": self.family.name, "component": denoiser.name, "config": self.config(denoiser)}
        found = [a for a in self._known if a.stage == "graph" and {k: a.inputs.get(k) for k in like} == like]
        names = [a.subject.rpartition(f" {denoiser.name} ")[0] for a in found]
        return next((name for name in names if name != self.recipe.name), None)

    def config(self, component: Component) -> dict[str, Json]:
        return compiled(self.source.config(component.folder))

    def name(self, stage: str, subject: str) -> str:
        return f"{stage} {self.recipe.name} {subject}"

    def key(self, stage: str, subject: str) -> str:
        return next(s.key for s in self.steps if s.name == self.name(stage, subject))

    def buckets(self, component: Component) -> dict[str, Bucket]:
        """Bucket by its name in artifacts and bundles."""
        if not component.per_bucket:
            return {ANY: self.recipe.buckets[0]}
        return {str(bucket): bucket for bucket in self.recipe.buckets}

    def graphs(self, component: Component) -> None:
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
                _export(self, component, bucket, folder)

            self.add("graph", f"{component.name} {label}", inputs, run)

    def engines(self, component: Component) -> None:
        folder = self.source.path / component.folder
        files = find_weights(folder)
        labels = list(self.buckets(component))
        first = self.name("graph", f"{component.name} {labels[0]}")
        inputs: dict[str, Json] = {
            "family": self.family.name,
            "component": component.name,  # both halves of a VAE come from one checkpoint
            "checkpoint": {f.name: self.store.digest_of(f) for f in files},
            "config": self.config(component),
            "recipe": _precision(self.recipe.component(component.name)),
            "backend": self.backend.name,
            "tools": tool_versions(EXPORT_TOOLS),
        }

        def run(built: Built, out: Path, within: Within) -> None:
            with _named(f"weights {component.name}"):
                _weights(self, folder, built[first], out)

        shared: dict[str, Json] = {"weights": self.add("weights", component.name, inputs, run, [first])}
        if not self.steps[-1].hit:
            # Damaged, half-downloaded and foreign files are found now, not after the export.
            require_plain(read_folder(folder), folder)
        if self.backend.packs(self.options):
            # Made from the first bucket, and so the same for whatever buckets follow it.
            shared["packed"] = self.tied("packed", component, labels[0], dict(shared))
        if len(labels) > 1 and self.backend.merges(self.options):
            self.merged(component, labels)
            labels = [PROFILES]
        for label in labels:
            self.tied("engine", component, label, shared)

    def merged(self, component: Component, labels: Sequence[str]) -> None:
        """One graph for the buckets `labels`, from theirs."""
        subjects = [f"{component.name} {label}" for label in labels]
        names = [self.name("graph", subject) for subject in subjects]
        inputs: dict[str, Json] = {
            "graphs": [self.key("graph", subject) for subject in subjects],
            "tools": tool_versions(("onnx-ir",)),
        }

        def run(built: Built, out: Path, within: Within) -> None:
            with _named(f"merged {component.name}"):
                _merge([built[name].file(GRAPH) for name in names], out / GRAPH)

        self.add("merged", f"{component.name} {PROFILES}", inputs, run, names)

    def tied(self, stage: str, component: Component, label: str, shared: dict[str, Json]) -> str:
        """A step of the backend: from one graph and the weight files `shared`, role -> key."""
        source = "merged" if label == PROFILES else "graph"
        graph = self.name(source, f"{component.name} {label}")
        roles = {role: self.name(role, component.name) for role in shared}
        inputs: dict[str, Json] = {
            "backend": self.backend.name,
            "device": self.device,
            "options": {k: v for k, v in self.options.items() if k not in self.backend.run_options},
            **shared,
            "graph": self.key(source, f"{component.name} {label}"),
        }

        subject = component.name if stage == "packed" else f"{component.name} {label}"

        def run(built: Built, out: Path, within: Within) -> None:
            import onnx_ir as ir

            files = {role: _only_file(built[name]) for role, name in roles.items()}
            with _named(f"{stage} {subject}"), tempfile.TemporaryDirectory(prefix="diffbuild-") as scratch:
                path = Path(scratch) / GRAPH
                ir.save(prepared(self.backend, built[graph]), path)
                if stage == "packed":
                    self.backend.pack(path, files, out, self.options)
                else:
                    self.backend.build(path, files, out, self.options, within)

        return self.add(stage, subject, inputs, run, [graph, *roles.values()])

    def tokenizers(self) -> None:
        from toolchain.models.tokenizers import write_tokenizer

        for component in self.family.parts(self.recipe):
            if component.tokenizer is None:
                continue
            folder, cls = self.source.path / component.tokenizer, self.source.class_of(component.tokenizer)
            t5 = self.source.class_of(component.folder).startswith("T5")
            ids = component.spec(self.source, self.recipe.buckets[0], self.recipe).input("ids")
            files = sorted(f for f in folder.glob("*") if f.suffix in (".json", ".txt", ".model"))
            inputs: dict[str, Json] = {
                "files": {f.name: self.store.digest_of(f) for f in files},
                "class": cls,
                "t5": t5,
                "inversion": self.family.inversion,
                "length": ids.shape[1],
                "tools": tool_versions(("transformers", "tokenizers")),
            }

            write = partial(write_tokenizer, folder, cls, ids.shape[1], t5=t5, inversion=self.family.inversion)

            def run(_: Built, out: Path, within: Within, write: Callable[[Path], None] = write) -> None:
                write(out)

            self.add("tokenizer", component.tokenizer, inputs, run)

    def samplers(self) -> None:
        """One step for the tables of each scheduler."""
        settings = self.family.settings(self.source)
        found: dict[str, dict[int, bool]] = {}
        for text, counts in self.recipe.sampling.tables.items():
            spec = parse(text)
            own = found.setdefault(spec.canonical, {})
            for steps, asked in counts.items():  # a list of its own has one number of steps, whatever the others have
                number = steps_of(spec, settings.scheduler, steps)
                own[number] = own.get(number, False) or asked or bool(spec.lists)
        for canonical, counts in found.items():
            self.sampler(canonical, counts, settings)

    def sampler(self, spec: str, counts: Mapping[int, bool], settings: ModelSettings) -> None:
        """`counts`: numbers of steps, each with whether it must be there; others are left out where they cannot."""
        sizes = list(dict.fromkeys(settings.tokens(b.height, b.width) for b in self.recipe.buckets))
        strengths = self.recipe.sampling.strengths
        tables = {}
        for steps in sorted(counts):
            skips = dict.fromkeys([0, *(settings.skipped_steps(steps, strength) for strength in strengths)])
            for tokens, skip in itertools.product(sizes, skips):
                if skip < steps:  # a strength may be too small for the shortest schedules
                    tables[table_name(spec, steps, tokens=tokens, skip=skip)] = steps, tokens, skip
        inputs: dict[str, Json] = {
            "scheduler": spec,
            "steps": spans(counts),
            "required": spans(steps for steps, required in counts.items() if required),
            "tokens": [*sizes],
            "strengths": [*strengths],
            "early_start": settings.early_start,
            "linear_sigmas": settings.linear_sigmas,
            "config": compiled(settings.scheduler),
            "tools": tool_versions(("diffusers", "torch")),
        }

        def run(_: Built, out: Path, within: Within) -> None:
            from toolchain.sampler.compile import compile_table

            linear, written, left = settings.linear_sigmas, dict[str, Any](), dict[int, str]()
            for number, (name, (steps, tokens, skip)) in enumerate(tables.items()):
                within(f"table {number + 1} of {len(tables)}", number / len(tables))
                try:
                    table = compile_table(
                        spec, steps, settings.scheduler, skip=skip, tokens=tokens, linear_sigmas=linear
                    )
                    written[name] = table.to_json()
                except (RequestError, SamplerError) as error:
                    if counts[steps]:
                        raise
                    written[name] = left[steps] = error.what if error.got is None else f"{error.what}: {error.got}"
            if left:
                log.warning(
                    "no tables of %s for %s steps: %s", spec, spans(left), "; ".join(dict.fromkeys(left.values()))
                )
            (out / TABLES).write_text(json.dumps(written, separators=(",", ":")))

        self.add("sampler", spec, inputs, run)


def _precision(own: ComponentRecipe) -> dict[str, Json]:
    """What of a component's table decides its graph and weights.

    `tokens` is in the signature where there is such a choice, and in float32 there is nothing to keep.
    """
    return {"dtype": own.dtype, "keep_float32": [*sorted(own.keep_float32)] if own.dtype != "float32" else []}


def compiled(config: Mapping[str, Any]) -> dict[str, Json]:
    """A config without its names and library versions, which change nothing that is compiled."""
    kept = {k: v for k, v in config.items() if k not in ("_name_or_path", "_diffusers_version", "transformers_version")}
    plain: dict[str, Json] = json.loads(json.dumps(kept), parse_constant=str)  # schedulers' configs hold infinities
    return plain


@contextmanager
def _named(step: str) -> Iterator[None]:
    """An error tells which of the recipe's engines it was: a backend knows files alone."""
    try:
        yield
    except (EngineError, ExportError) as error:
        what = f"{step}: {error.what}"
        kind = type(error)
        raise kind(what, where=error.where, expected=error.expected, got=error.got, hint=error.hint) from error


def _only_file(artifact: Artifact) -> Path:
    (name,) = artifact.files
    return artifact.file(name)


def _export(planner: Planner, component: Component, bucket: Bucket, folder: Path) -> None:
    from toolchain.export.capture import capture, write_graph

    write_graph(capture(component, planner.source, planner.recipe, bucket), folder)


def _merge(graphs: Sequence[Path], out: Path) -> None:
    import onnx_ir as ir

    from toolchain.graph.profiles import merge_buckets

    ir.save(merge_buckets([ir.load(path) for path in graphs]), out)


def prepared(backend: Backend, graph: Artifact) -> ir.Model:
    """An exported graph in the backend's form, and sound: quick, and so no artifact of its own. Raises ExportError."""
    import onnx_ir as ir

    from toolchain.graph.typed import check_types

    model = backend.prepare(ir.load(graph.file(GRAPH)))
    check_types(model)
    return model


def _weights(planner: Planner, checkpoint: Path, graph: Artifact, out: Path) -> None:
    from toolchain.weights.derived import find_tensors, weight_uses, write_weights

    uses = weight_uses(prepared(planner.backend, graph))
    write_weights(uses, find_tensors(uses, read_folder(checkpoint), checkpoint), out / "weights.safetensors")
