"""What a calibration has to do: the recipe's pictures, drawn without quantisation by engines whose activations are
watched."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from toolchain.builder import stages
from toolchain.builder.digests import config_digest, weights_digest
from toolchain.builder.planner import Planner
from toolchain.builder.quantization import CALIBRATED
from toolchain.builder.stages.graph import GRAPH
from toolchain.builder.stages.sampler import TABLES
from toolchain.builder.steps import Built, StepId, Within
from toolchain.bundle.bundle import Bundle, EngineEntry
from toolchain.engines.backend import Buffers, Engine, Runner, Weights
from toolchain.engines.buffers import Memory
from toolchain.engines.builders import builder_of
from toolchain.engines.runners import runner_of
from toolchain.errors import EngineError
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.precision.collect import WATCHED, Collector
from toolchain.recipe import Calibration, Recipe, Safety
from toolchain.recipe.options import BackendOptions
from toolchain.runtime.observer import Observer
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.store.artifacts import Artifact, Json, Store
from toolchain.store.links import link_file

FALLBACK = "onnxruntime"
"""The backend that draws where the recipe's own cannot run."""


class CalibrationPlanner(Planner):
    """Collects the steps of a calibration."""

    def __init__(self, recipe: Recipe, source: ModelSource, family: Family, store: Store) -> None:
        """The recipe has a table `calibration`. Raises EngineError where no backend can draw here."""
        assert recipe.calibration is not None
        self._asked = recipe.calibration
        backend = _reference_backend(recipe)
        super().__init__(
            _reference(recipe, recipe.calibration, backend),
            source,
            family,
            builder_of(backend),
            store,
            builder_of(backend).device(),
        )

    def plan(self) -> None:
        """Adds every step; the last is the calibration's."""
        self.tokenizers()
        self.samplers()
        parts = [c for c in self.family.parts(self.recipe) if c.name != "vae_encoder"]
        for component in parts:
            self.graphs(component)
        for component in parts:
            if component.name in CALIBRATED:
                (label,) = self.buckets(component)
                self.backend_step("watched", component, label, self.weights(component))
            else:
                self.engines(component)
        self._calibration(parts)

    def _calibration(self, parts: list[Component]) -> None:
        asked, sampling = self._asked, self.recipe.sampling
        (bucket,) = self.recipe.buckets
        decisive = [s for s in self.steps if s.stage in ("tokenizer", "sampler", "graph", "weights")]
        inputs: dict[str, Json] = {
            "components": [*CALIBRATED],
            "backend": self.backend.name,
            "made_from": {str(s.id): s.key for s in decisive},
            "prompts": [*asked.prompts],
            "seeds": [*asked.seeds],
            "scheduler": sampling.scheduler,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "bucket": str(bucket),
        }
        step = StepId("calibration", " and ".join(CALIBRATED))

        def run(built: Built, out: Path, within: Within) -> None:
            _Run(self, asked, parts, built).write(out, self.store.partial(self.key(step)), within)

        self.add(step, ("builder.stages.calibration",), inputs, run, [s.id for s in self.steps])

    def about(self) -> dict[str, Any]:
        """How the ranges come to be, for their file."""
        asked, sampling = self._asked, self.recipe.sampling
        components = [self.family.component(name) for name in CALIBRATED]
        return {
            "model": self.source.name,
            "configs": {c.name: config_digest(self.config(c)) for c in components},
            "weights": {c.name: weights_digest(self.store, self.source.path / c.folder) for c in components},
            "dtypes": {c.name: self.recipe.component(c.name).dtype for c in components},
            "backend": self.backend.name,
            "pictures": len(asked.prompts) * len(asked.seeds),
            "scheduler": sampling.scheduler,
            "steps": sampling.steps,
            "guidance": sampling.guidance,
            "bucket": str(self.recipe.buckets[0]),
        }


def _reference_backend(recipe: Recipe) -> str:
    """The recipe's own backend, or ONNX Runtime where that cannot run. Raises EngineError where that cannot either."""
    name = recipe.backend
    runner = runner_of(name)
    if runner.available() is None:
        device = builder_of(name).device()
        if runner.refuse(device, recipe.options(name)) is None:
            return name
    reason = runner_of(FALLBACK).available()
    if reason is not None:
        hint = "diffbuild doctor; or calibrate on another machine, and bring the file"
        raise EngineError("no backend can draw the pictures of a calibration here", got=reason, hint=hint)
    return FALLBACK


def _reference(recipe: Recipe, asked: Calibration, backend: str) -> Recipe:
    """The recipe that draws: without quantisation, in the first bucket alone."""
    components = recipe.unquantized.components
    if backend != recipe.backend:  # not every type of a GPU is one of the CPU
        components = {name: replace(c, dtype="float32", keep_float32=()) for name, c in components.items()}
    scheduler, steps = asked.scheduler or recipe.sampling.scheduler, asked.steps or recipe.sampling.steps
    return replace(
        recipe,
        name=f"{recipe.name} (calibration)",
        backend=backend,
        buckets=recipe.buckets[:1],
        components=components,
        sampling=replace(
            recipe.sampling,
            scheduler=scheduler,
            steps=steps,
            schedulers=(scheduler,),
            step_counts=(steps,),
            strengths=(),
        ),
        safety=Safety(),
        calibration=None,
    )


class _Run:
    """The pictures of a calibration, drawn by the runtime over the artifacts of its plan."""

    def __init__(self, planner: CalibrationPlanner, asked: Calibration, parts: list[Component], built: Built) -> None:
        self._planner, self._parts, self._built = planner, parts, built
        pictures = [(prompt, number) for number, prompt in enumerate(asked.prompts)]
        self._pictures = [(prompt, (seed + number) % 2**64) for seed in asked.seeds for prompt, number in pictures]

    def write(self, out: Path, partial: Path, within: Within) -> None:
        """Writes the ranges into the folder `out`."""
        from toolchain.runtime.pipeline import Pipeline

        planner, (bucket,) = self._planner, self._planner.recipe.buckets
        collectors = {c.name: self._collector(c) for c in self._parts if c.name in CALIBRATED}
        with tempfile.TemporaryDirectory(dir=out, prefix="bundle-") as scratch:
            bundle, position = self._bundle(Path(scratch)), _Position()
            folders = {_folder(bundle, name): collector for name, collector in collectors.items()}
            runner = WatchingRunner(runner_of(planner.backend.name), folders, position)
            with closing(Pipeline(bundle, warm_up=False, observer=position, backend=runner)) as pipe:

                def draw(first: int) -> None:
                    chosen = self._pictures[first : first + bucket.batch]
                    pipe([prompt for prompt, _ in chosen], seed=[seed for _, seed in chosen])

                count, about = len(self._pictures), planner.about()
                stages.calibration.write(collectors, count, bucket.batch, draw, about, out, partial, within)

    def _collector(self, component: Component) -> Collector:
        (label,) = self._planner.buckets(component)
        graph = self._built[StepId("graph", component.name, label)].file(GRAPH)
        return stages.calibration.collector_of(self._planner.backend, graph)

    def _bundle(self, folder: Path) -> Bundle:
        """What the runtime opens: links to the artifacts, in the places that they have in a bundle."""
        planner = self._planner
        engines = {c.name: self._engine(folder, c) for c in self._parts}
        samplers: dict[str, str] = {}
        for step in planner.steps:
            if step.stage == "sampler":
                target = f"samplers/{step.key}.json"
                link_file(self._built[step.id].file(TABLES), folder / target)
                tables = json.loads((folder / target).read_text(encoding="utf-8"))
                samplers |= dict.fromkeys(tables, target)
        tokenizers = {c.name: f"tokenizers/{c.tokenizer}" for c in self._parts if c.tokenizer}
        for target in tokenizers.values():
            _link_all(self._built[StepId("tokenizer", Path(target).name)], folder / target)
        assert planner.device is not None
        return Bundle(
            path=folder,
            model={},
            family=planner.family.name,
            settings=planner.family.settings(planner.source),
            recipe=planner.recipe,
            backend=planner.backend.name,
            device=planner.device,
            engines=engines,
            samplers=samplers,
            tokenizers=tokenizers,
            files={},
            artifacts={},
            tools={},
            vouched=True,
        )

    def _engine(self, folder: Path, component: Component) -> dict[str, EngineEntry]:
        planner, name = self._planner, component.name
        (label,) = planner.buckets(component)
        weights: dict[str, str] = {}
        roles: tuple[Literal["weights", "packed"], ...] = ("weights", "packed")
        for role in roles if planner.backend.reads_weights(planner.options) else ():
            artifact = self._built.get(StepId(role, name))
            if artifact is not None:
                (file,) = artifact.files
                weights[role] = f"engines/{name}/{file}"
                link_file(artifact.file(file), folder / weights[role])
        stage: Literal["watched", "engine"] = "watched" if name in CALIBRATED else "engine"
        _link_all(self._built[StepId(stage, name, label)], folder / "engines" / name / label)
        signature: Any = next(s for s in planner.steps if s.id == StepId("graph", name, label)).inputs["signature"]
        return {label: EngineEntry(f"engines/{name}/{label}", weights, GraphSpec.from_json(signature))}


def _folder(bundle: Bundle, component: str) -> Path:
    (entry,) = bundle.engines[component].values()
    return bundle.path / entry.folder


def _link_all(artifact: Artifact, folder: Path) -> None:
    for name in artifact.files:
        link_file(artifact.file(name), folder / name)


class _Position(Observer):
    """Knows in which step of the denoising loop the pipeline is; 0 outside of it."""

    step = 0

    @contextmanager
    def evaluation(self, index: int, total: int, timestep: float) -> Iterator[None]:
        """Observes an evaluation."""
        self.step = index
        yield
        self.step = 0


class WatchingRunner:
    """A runner whose engines in some folders were built by `stages.calibration.write_watched`: collectors see what each
    launch of them tells."""

    def __init__(self, runner: Runner[Any], collectors: Mapping[Path, Collector], position: _Position) -> None:
        """`collectors`: by the engines' folders."""
        self._runner, self._collectors, self._position = runner, collectors, position
        self.name = runner.name

    def available(self) -> str | None:
        """As the runner's."""
        return self._runner.available()

    def refuse(self, built_on: Mapping[str, Any], options: BackendOptions) -> str | None:
        """As the runner's."""
        return self._runner.refuse(built_on, options)

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        """As the runner's."""
        return self._runner.install(built_on)

    def memory(self, folders: Any, options: BackendOptions, open_buckets: int | None = None) -> Memory:
        """As the runner's."""
        return self._runner.memory(folders, options, open_buckets)

    def open(self, folder: Path, weights: Weights, spec: GraphSpec, options: BackendOptions, memory: Memory) -> Engine:
        """Opens an engine, and has its collector watch it."""
        collector = self._collectors.get(folder)
        if collector is None:
            return self._runner.open(folder, weights, spec, options, memory)
        output = TensorSpec(WATCHED, "float32", (collector.size,))
        watched = GraphSpec(spec.inputs, (*spec.outputs, output))
        engine = self._runner.open(folder, weights, watched, options, memory)
        return WatchedEngine(engine, spec, memory, lambda values: collector.add(self._position.step, values))


class WatchedEngine:
    """An engine with one output more than its `spec` has, which a function is called with after each launch."""

    def __init__(self, engine: Engine, spec: GraphSpec, memory: Memory, tell: Callable[[Any], None]) -> None:
        self.spec = spec
        self._engine, self._memory, self._tell = engine, memory, tell
        self._buffer = memory.zeros(engine.spec.outputs[-1].shape, engine.spec.outputs[-1].dtype)

    def bind(self, buffers: Buffers) -> Callable[[], None]:
        """As `Engine.bind`. Each launch waits for the device."""
        launch = self._engine.bind({**buffers, WATCHED: self._buffer})

        def watched() -> None:
            launch()
            self._tell(self._memory.read(self._buffer)[0])

        return watched

    def close(self) -> None:
        """Closes the engine and frees its buffer."""
        self._engine.close()
        self._memory.free(self._buffer)
