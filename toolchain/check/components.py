"""Every component against its torch module, on inputs from real denoising trajectories of the reference.

Each component gets the reference's outputs as inputs, never those of the engine before it: errors do not propagate.
Reference modules are loaded one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.check.measure import Arrays, Feed, call, compare_engine
from toolchain.check.reference import reference_module
from toolchain.check.report import Entry
from toolchain.check.rounding import RoundedComponent
from toolchain.engines.buffers import HostMemory
from toolchain.engines.runners import runner_of
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket
from toolchain.runtime import safety
from toolchain.runtime.engines import open_engine, open_memory
from toolchain.runtime.noise import Generator
from toolchain.runtime.prompt import PromptTokenizer
from toolchain.runtime.start import draw, normal, place_sampler, place_scales, place_time_ids
from toolchain.runtime.text import Conditions, place
from toolchain.sampler.layout import MAX_EVALUATIONS
from toolchain.sampler.table import SamplerTable
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch import nn

F32 = NDArray[np.float32]
HOST = HostMemory()
Progress = Callable[[str], None]
RECORDED = 7
"""Evaluations of each trajectory that the engine is given: enough for a curve, and a third of a usual schedule."""


def compare_components(
    bundle: Bundle,
    source: ModelSource,
    family: Family,
    tables: Mapping[Bucket, SamplerTable],
    progress: Progress,
) -> list[Entry]:
    """Entries of every component and bucket. `tables` are the samplers that the trajectories follow.

    Raises EngineError when an engine cannot run, and what loading the reference raises.
    """
    comparison = _Comparison(bundle, source, family, progress)
    conditions = comparison.text_encoders([*bundle.recipe.check.prompts, ""])
    latents = comparison.denoiser(tables, conditions)
    pixels = comparison.decoder(latents)
    if "vae_encoder" in bundle.engines:
        comparison.encoder(pixels)
    if safety.COMPONENT in bundle.engines:
        comparison.checker(pixels)
    return comparison.entries


class _Comparison:
    def __init__(self, bundle: Bundle, source: ModelSource, family: Family, progress: Progress) -> None:
        self.bundle, self.source, self.family, self.progress = bundle, source, family, progress
        self.prompts = bundle.recipe.check.prompts
        self.guided = bundle.recipe.classifier_free_guidance
        self.entries: list[Entry] = []
        self.rounded: RoundedComponent | None = None

    def text_encoders(self, texts: Sequence[str]) -> dict[str, Conditions]:
        """The reference's conditions for each text, by the text."""
        labels = [*(f"prompt {i + 1}" for i in range(len(texts) - 1)), "empty prompt"]
        conditions: dict[str, Conditions] = {text: {} for text in texts}
        for name, folder in self.bundle.tokenizers.items():
            tokenizer = PromptTokenizer(self.bundle.path / folder)
            component = self.family.component(name)
            spec = self.bundle.engine(name, self.bundle.buckets[0]).spec
            feeds = []
            for label, encoded in zip(labels, map(tokenizer.encode, texts), strict=True):
                given = {"ids": encoded.ids, "mask": encoded.mask, "clip_skip": np.zeros(1, np.int64)}
                feeds.append(Feed(label, {t.name: given[t.name] for t in spec.inputs}))
            with self._reference(component) as module:
                compared = self._compare(component, None, module, feeds)
            for text, outputs in zip(texts, compared, strict=True):
                conditions[text] |= {key: value[0] for key, value in outputs.items()}
        return conditions

    def denoiser(
        self, tables: Mapping[Bucket, SamplerTable], conditions: dict[str, Conditions]
    ) -> dict[Bucket, list[Feed]]:
        """The decoder's inputs for each bucket: where the reference's trajectories end."""
        component = self.family.component("denoiser")
        ends: dict[Bucket, list[Feed]] = {}
        with self._reference(component) as module:
            for bucket in self.bundle.buckets:
                feeds: list[Feed] = []
                ends[bucket] = []
                spec = self.bundle.engine("denoiser", bucket).spec
                for label, chosen in _batches(len(self.prompts), bucket.batch):
                    self.progress(f"denoiser {bucket}: reference trajectory, {label}")
                    positives = [conditions[self.prompts[i]] for i in chosen]
                    inputs = self._start(spec, bucket, tables[bucket], positives, conditions[""])
                    generators = self._generators(bucket.batch)
                    recorded, latents = _trajectory(module, spec, tables[bucket], inputs, generators, label)
                    feeds += recorded
                    ends[bucket].append(Feed(f"{label}, final latents", {"latents": latents}))
                self._compare(component, bucket, module, feeds)
        return ends

    def decoder(self, feeds: dict[Bucket, list[Feed]]) -> dict[Bucket, list[Feed]]:
        """The encoder's inputs for each bucket: the reference's pictures, with noise."""
        component = self.family.component("vae_decoder")
        pictures: dict[Bucket, list[Feed]] = {}
        with self._reference(component) as module:
            for bucket in self.bundle.buckets:
                outputs = self._compare(component, bucket, module, feeds[bucket])
                pictures[bucket] = []
                for feed, output in zip(feeds[bucket], outputs, strict=True):
                    generators, shape = self._generators(bucket.batch), feed.inputs["latents"].shape
                    draws: Arrays = {name: normal(shape, generators) for name in ("noise", "start_noise")}
                    scales: Arrays = {"signal": np.ones(1, np.float32), "sigma": np.full(1, 0.5, np.float32)}
                    inputs = {"pixels": output["pixels"], **draws, **scales}
                    label = feed.label.replace("final latents", "picture")
                    pictures[bucket].append(Feed(label, inputs))
        return pictures

    def encoder(self, feeds: dict[Bucket, list[Feed]]) -> None:
        component = self.family.component("vae_encoder")
        with self._reference(component) as module:
            for bucket in self.bundle.buckets:
                self._compare(component, bucket, module, feeds[bucket])

    def checker(self, feeds: dict[Bucket, list[Feed]]) -> None:
        """The safety checker on the same pictures as the encoder."""
        settings = self.bundle.settings.safety
        assert settings is not None
        prepared = [
            Feed(feed.label, {"image": safety.prepare(picture, settings)})
            for by_bucket in feeds.values()
            for feed in by_bucket
            for picture in feed.inputs["pixels"]
        ]
        component = self.family.component(safety.COMPONENT)
        with self._reference(component) as module:
            self._compare(component, None, module, prepared)

    @contextmanager
    def _reference(self, component: Component) -> Iterator[nn.Module]:
        """The reference, and beside it, where the recipe computes in a smaller type, the component in that."""
        self.progress(f"{component.name}: loading the reference")
        recipe = self.bundle.recipe
        with reference_module(component, self.source, recipe) as module:
            if recipe.component(component.name).dtype != "float32":
                self.rounded = RoundedComponent(component, self.source, recipe, module)
            yield module
        self.rounded = None

    def _compare(
        self, component: Component, bucket: Bucket | None, module: nn.Module, feeds: list[Feed]
    ) -> list[Arrays]:
        """`bucket` is None for a component that has one engine for all of them."""
        label = ANY if bucket is None else str(bucket)
        some = bucket or self.bundle.buckets[0]
        self.progress(f"{component.name} {label}: comparing {len(feeds)} inputs")
        spec = self.bundle.engine(component.name, some).spec
        tolerance = self.bundle.recipe.tolerance(component.name)
        entries, outputs = compare_engine(
            component.name,
            label,
            spec,
            module,
            lambda: open_memory(self.bundle, runner_of(self.bundle.backend), 1),
            lambda memory: open_engine(self.bundle, runner_of(self.bundle.backend), component.name, some, memory),
            feeds,
            tolerance,
        )
        self.entries += entries
        if self.rounded is not None:
            self.progress(f"{component.name} {label}: every value rounded to {self.rounded.dtype}")
            self.entries += self.rounded.compare(label, spec, feeds, outputs, tolerance)
        return outputs

    def _start(
        self, spec: GraphSpec, bucket: Bucket, table: SamplerTable, conditions: list[Conditions], empty: Conditions
    ) -> Arrays:
        """Inputs of the first evaluation but for state and noise, as the runtime fills its buffers."""
        inputs: Arrays = {t.name: np.zeros(t.shape, t.dtype) for t in spec.inputs}
        place_sampler(HOST, inputs, table)
        # Scales that the recipe has no default for are off by default: the check turns them on to see them work.
        place_scales(HOST, inputs, {"guidance": self.bundle.default_guidance, "guidance_rescale": 0.5, "true_cfg": 2.0})
        sizes = (bucket.height, bucket.width, 0, 0, bucket.height, bucket.width)
        place_time_ids(HOST, inputs, sizes, sizes)
        place(HOST, inputs, [empty] * len(conditions) if self.guided else [], conditions)
        return inputs

    def _generators(self, batch: int) -> list[Generator]:
        """Another seed for each row, so that two rows that changed places are seen even where prompts repeat."""
        first = self.bundle.recipe.check.seeds[0]
        return [Generator((first + row) % 2**64) for row in range(batch)]


def _batches(prompts: int, batch: int) -> Iterator[tuple[str, list[int]]]:
    """Prompts in groups of `batch`, each with its label; the last group repeats its last prompt."""
    for first in range(0, prompts, batch):
        last = min(first + batch, prompts) - 1
        label = f"prompt {first + 1}" if last == first else f"prompts {first + 1}-{last + 1}"
        yield label, [min(first + row, last) for row in range(batch)]


def _recorded(evaluations: int) -> set[int]:
    """Which evaluations of a trajectory are compared: RECORDED of them, evenly spaced, the first and the last too."""
    intervals = RECORDED - 1
    return {(2 * i * (evaluations - 1) + intervals) // (2 * intervals) for i in range(RECORDED)}


def _trajectory(
    module: nn.Module,
    spec: GraphSpec,
    table: SamplerTable,
    inputs: Arrays,
    generators: list[Generator],
    label: str,
) -> tuple[list[Feed], F32]:
    """Some of the evaluations with the reference's outputs, and the latents [B, C, h, w] after the last."""
    inputs["state"][0] = normal(inputs["state"].shape[1:], generators) * np.float32(table.init_noise_sigma)
    chosen = _recorded(table.evaluations)
    recorded = []
    for index, draws in enumerate(table.noise_draws):
        if index and index % MAX_EVALUATIONS == 0:
            again = {name: inputs[name].copy() for name in ("timesteps", "table")}
            inputs = {**inputs, **again, "step": np.zeros_like(inputs["step"])}
            place_sampler(HOST, inputs, table, index)
        if draws:
            draw(HOST, inputs["noise"], generators)
        outputs = call(module, spec, inputs)
        if index in chosen:
            changing = {name: inputs[name].copy() for name in ("state", "step", "noise")}
            when = f"{label}, evaluation {index + 1} of {table.evaluations}"
            recorded.append(Feed(when, {**inputs, **changing}, index + 1, outputs))
        inputs = {**inputs, "state": outputs["next_state"], "step": outputs["next_step"]}
    return recorded, inputs["state"][0]
