"""recipe + model + device -> ordered steps, each a hit or a miss with the reason; and their execution.

A step's key is the hash of what goes into it: the code of its stage, the keys of the steps before it, its slice of the
recipe, the model's files, the versions that matter and, for engines, the device and the bucket. Planning imports
neither torch nor diffusers, so that a build with nothing to do takes a fraction of a second.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from toolchain.artifacts import Artifact, Json, Store, content_key
from toolchain.bundle import ANY
from toolchain.engines import Backend, backend_of
from toolchain.errors import EngineError, RecipeError, RequestError
from toolchain.export.safetensors import find_weights, read_folder
from toolchain.models import Component, Family, ModelSource, family_of
from toolchain.recipe import Bucket, Recipe
from toolchain.sampler.schedulers import parse
from toolchain.sampler.table import table_name
from toolchain.settings import ModelSettings

EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
ENGINE_CODE = ("engines", "graph", "export/safetensors.py", "export/weights.py", "weights.py")
CODE = {  # which packages of ours decide a stage's outcome
    "graph": ("models", "export", "graph", "sampler/table.py"),
    "weights": ("models", "export", "graph", "weights.py"),
    "packed": ENGINE_CODE,
    "engine": ENGINE_CODE,
    "sampler": ("sampler",),
    "tokenizer": ("models/tokenizers.py",),
}

Built = Mapping[str, Artifact]
Within = Callable[[str, float], None]
"""How far one step is: the name of its phase and how much of that is done, 0 to 1."""


@dataclass(frozen=True)
class Step:
    """One artifact to have. `name` is "stage subject"; `run` gets the artifacts built before it, a folder to fill and
    whom to tell how far it is.

    changed: for a miss, the fields that differ from the last artifact of the same name; empty when there was none.
    needs: names of the steps whose artifacts `run` reads.
    """

    stage: str
    subject: str
    key: str
    inputs: Mapping[str, Json]
    hit: bool
    changed: tuple[str, ...]
    run: Callable[[Built, Path, Within], None]
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.stage} {self.subject}"


@dataclass(frozen=True)
class Plan:
    recipe: Recipe
    source: ModelSource
    family: Family
    backend: Backend
    store: Store
    steps: tuple[Step, ...]

    @property
    def misses(self) -> int:
        return sum(not step.hit for step in self.steps)

    def step(self, name: str) -> Step:
        return next(s for s in self.steps if s.name == name)


def tool_versions(names: Sequence[str]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


@cache
def code_digest(stage: str) -> str:
    """Digest of the source files that decide a stage's outcome: a version number that nobody can forget to raise."""
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for place in CODE[stage]:
        path = root / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def make_plan(recipe: Recipe, source: ModelSource, store: Store, *, graphs_only: bool = False) -> Plan:
    """Every step of a build, in order. Raises ModelError and RecipeError before any work is done.

    graphs_only: no weights, engines, tables or tokenizer; needs the config files alone.
    """
    family = family_of(source, recipe)
    backend = backend_of(recipe.backend)
    check_recipe(recipe, family, backend, source, graphs_only=graphs_only)
    planner = _Planner(recipe, source, family, backend, store)
    if not graphs_only:
        # Quick to build, and so first: what cannot be compiled here is refused before hours of work.
        planner.tokenizers()
        planner.samplers()
    for component in family.parts(recipe):
        planner.graphs(component)
    if not graphs_only:
        for component in family.parts(recipe):
            planner.engines(component)
    return Plan(recipe, source, family, backend, store, tuple(planner.steps))


def check_recipe(
    recipe: Recipe, family: Family, backend: Backend, source: ModelSource, *, graphs_only: bool = False
) -> None:
    """What only family and backend can know of a recipe. Raises RecipeError with every problem."""
    problems = []
    names = [c.name for c in family.parts(recipe)]
    for name, component in recipe.components.items():
        if component.dtype not in backend.dtypes and not graphs_only:
            can = " or ".join(backend.dtypes)
            problems.append(f"components.{name}.dtype: {backend.name} cannot run {component.dtype} (expected {can})")
    if not graphs_only:
        problems += [f"{backend.name}.{problem}" for problem in backend.problems(recipe.to_json()[backend.name])]
    optional = [c.name for c in family.components if c.optional]
    for name in recipe.without:
        if name not in optional:
            problems.append(f"without: {name} cannot be left out (expected {' or '.join(optional)})")
    for table, keys in (("components", recipe.components), ("check.components", recipe.check.components)):
        for name in keys:
            if name not in names:
                problems.append(f"{table}.{name}: unknown component (expected one of {', '.join(names)})")
    multiple = family.settings(source).multiple
    for bucket in recipe.buckets:
        if bucket.height % multiple or bucket.width % multiple:
            problems.append(f"buckets: {bucket} has sides that are no multiples of {multiple}, as the model needs them")
    for spec in dict.fromkeys([recipe.sampling.scheduler, *recipe.sampling.schedulers]):
        try:
            parse(spec)
        except RequestError as error:
            hint = f"; {error.hint}" if error.hint else ""
            problems.append(f"sampling.schedulers: {error.what} (got {spec}){hint}")
    if problems:
        raise RecipeError("the recipe does not fit the model:\n    " + "\n    ".join(problems), where=recipe.name)


class _Planner:
    """Collects the steps of one plan; a step may use the keys of the steps before it."""

    def __init__(self, recipe: Recipe, source: ModelSource, family: Family, backend: Backend, store: Store) -> None:
        self.recipe, self.source, self.family, self.backend, self.store = recipe, source, family, backend, store
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
        # One subject per model and recipe, so that `explain` compares like with like.
        name = f"{self.recipe.name} {subject}"
        changed = [] if hit else self.store.explain(stage, name, inputs)
        self.steps.append(Step(stage, name, key, inputs, hit, tuple(changed), run, tuple(needs)))
        return key

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
        recipe = self.recipe.component(component.name)
        for label, bucket in self.buckets(component).items():
            spec = component.spec(self.source, bucket, self.recipe)
            inputs: dict[str, Json] = {
                "config": _config_digest(self.source.config(component.folder)),
                "signature": spec.to_json(),
                "recipe": _json(recipe),
                # Of the denoiser alone: a text encoder is the same with and without guidance.
                "guided": self.guided and component.name == "denoiser",
                "backend": self.backend.name,
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
            "component": component.name,  # both halves of a VAE come from one checkpoint
            "checkpoint": {f.name: self.store.digest_of(f) for f in files},
            "config": _config_digest(self.source.config(component.folder)),
            "recipe": _json(self.recipe.component(component.name)),
            "backend": self.backend.name,
            "tools": tool_versions(EXPORT_TOOLS),
        }
        shared: dict[str, Json] = {
            "weights": self.add(
                "weights", component.name, inputs, lambda built, out, _: _weights(folder, built[first], out), [first]
            )
        }
        if not self.steps[-1].hit:
            read_folder(folder)  # a damaged or half-downloaded file is found now, not after the export
        if self.backend.packs(self.options):
            # Made from the first bucket, and so the same for whatever buckets follow it.
            shared["packed"] = self.tied("packed", component, labels[0], dict(shared))
        for label in labels:
            self.tied("engine", component, label, shared)

    def tied(self, stage: str, component: Component, label: str, shared: dict[str, Json]) -> str:
        """A step of the backend: from the graph of one bucket and the weight files `shared`, role -> key."""
        graph = self.name("graph", f"{component.name} {label}")
        roles = {role: self.name(role, component.name) for role in shared}
        inputs: dict[str, Json] = {
            "backend": self.backend.name,
            "device": self.backend.device(),
            "options": {k: v for k, v in self.options.items() if k not in self.backend.run_options},
            **shared,
            "graph": self.key("graph", f"{component.name} {label}"),
        }

        subject = component.name if stage == "packed" else f"{component.name} {label}"

        def run(built: Built, out: Path, within: Within) -> None:
            files = {role: _only_file(built[name]) for role, name in roles.items()}
            with _named(f"{stage} {subject}"):
                if stage == "packed":
                    self.backend.pack(built[graph].file("graph.onnx"), files, out, self.options)
                else:
                    self.backend.build(built[graph].file("graph.onnx"), files, out, self.options, within)

        return self.add(stage, subject, inputs, run, [graph, *roles.values()])

    def tokenizers(self) -> None:
        from toolchain.models.tokenizers import write_tokenizer

        for component in self.family.parts(self.recipe):
            if component.tokenizer is None:
                continue
            folder, cls = self.source.path / component.tokenizer, self.source.class_of(component.tokenizer)
            ids = component.spec(self.source, self.recipe.buckets[0], self.recipe).input("ids")
            files = sorted(f for f in folder.glob("*") if f.suffix in (".json", ".txt", ".model"))
            inputs: dict[str, Json] = {
                "files": {f.name: self.store.digest_of(f) for f in files},
                "class": cls,
                "length": ids.shape[1],
                "tools": tool_versions(("transformers", "tokenizers")),
            }

            def run(
                _: Built, out: Path, within: Within, folder: Path = folder, cls: str = cls, length: int = ids.shape[1]
            ) -> None:
                write_tokenizer(folder, cls, length, out)

            self.add("tokenizer", component.tokenizer, inputs, run)

    def samplers(self) -> None:
        settings = self.family.settings(self.source)
        sizes = dict.fromkeys(settings.tokens(b.height, b.width) for b in self.recipe.buckets)
        for spec, steps in self.recipe.sampling.tables:
            skips = [settings.skipped_steps(steps, strength) for strength in self.recipe.sampling.strengths]
            for tokens, skip in itertools.product(sizes, dict.fromkeys([0, *skips])):
                if skip < steps:  # a strength may be too small for the shortest schedules
                    self.sampler(parse(spec).canonical, steps, tokens, skip, settings)

    def sampler(self, spec: str, steps: int, tokens: int, skip: int, settings: ModelSettings) -> None:
        inputs: dict[str, Json] = {
            "scheduler": spec,
            "steps": steps,
            "tokens": tokens,
            "skip": skip,
            "linear_sigmas": settings.linear_sigmas,
            "config": _config_digest(settings.scheduler),
            "tools": tool_versions(("diffusers", "torch")),
        }

        def run(_: Built, out: Path, within: Within) -> None:
            from toolchain.sampler.compile import compile_table

            linear = settings.linear_sigmas
            table = compile_table(spec, steps, settings.scheduler, skip=skip, tokens=tokens, linear_sigmas=linear)
            (out / "table.json").write_text(json.dumps(table.to_json()))

        self.add("sampler", table_name(spec, steps, tokens=tokens, skip=skip), inputs, run)


def _json(value: Any) -> Json:
    data: Json = json.loads(json.dumps(asdict(value)))
    return data


def _config_digest(config: Mapping[str, Any]) -> str:
    """Names and library versions in a config change nothing that is compiled."""
    kept = {k: v for k, v in config.items() if k not in ("_name_or_path", "_diffusers_version", "transformers_version")}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


@contextmanager
def _named(step: str) -> Iterator[None]:
    """An engine's error tells which of the recipe's it was: a backend knows files alone."""
    try:
        yield
    except EngineError as error:
        what = f"{step}: {error.what}"
        raise EngineError(what, where=error.where, expected=error.expected, got=error.got, hint=error.hint) from error


def _only_file(artifact: Artifact) -> Path:
    (name,) = artifact.files
    return artifact.file(name)


def _export(planner: _Planner, component: Component, bucket: Bucket, folder: Path) -> None:
    from toolchain.export.capture import capture, write_graph

    captured = capture(component, planner.source, planner.recipe, bucket)
    write_graph(planner.backend.prepare(captured), folder)


def _weights(checkpoint: Path, graph: Artifact, out: Path) -> None:
    import onnx_ir as ir

    from toolchain.export.weights import find_tensors, weight_uses, write_weights

    uses = weight_uses(ir.load(graph.file("graph.onnx")))
    write_weights(uses, find_tensors(uses, read_folder(checkpoint), checkpoint), out / "weights.safetensors")


def execute(
    plan: Plan,
    progress: Callable[[Step, str], None],
    within: Callable[[Step, str, float], None] = lambda step, phase, share: None,
) -> dict[str, Artifact]:
    """Builds what is missing and returns every artifact by its step's name.

    `progress` is called with (step, "start" | "built" | "hit"), `within` with how far a long step is. What was built
    before an error or an interruption stays in the store, and the next build goes on from there. What a step reads is
    verified before it runs, since damage in it would go on under a key that says otherwise; a build with nothing to do
    reads no artifact. StoreError.
    """
    built: dict[str, Artifact] = {}
    sound: set[str] = set()
    for step in plan.steps:
        progress(step, "start")

        def fill(folder: Path, step: Step = step) -> None:
            for name in step.needs:
                if name not in sound:
                    built[name].verify()
                    sound.add(name)
            step.run(built, folder, partial(within, step))

        artifact, was_built = plan.store.get_or_build(step.stage, step.subject, step.inputs, fill)
        built[step.name] = artifact
        if was_built:
            sound.add(step.name)
        progress(step, "built" if was_built else "hit")
    return built
