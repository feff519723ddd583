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
from toolchain.check.feeds import batches, start_inputs, text_feeds, trajectory
from toolchain.check.measure import Arrays, Feed, compare_engine
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
from toolchain.runtime.start import normal
from toolchain.runtime.text import Conditions
from toolchain.sampler.table import SamplerTable

if TYPE_CHECKING:
    from torch import nn

F32 = NDArray[np.float32]
HOST = HostMemory()
Progress = Callable[[str], None]
SCALES = {"guidance_rescale": 0.5, "true_cfg": 2.0}
"""Off by default in every recipe: the check turns them on to see them work."""


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
            feeds = text_feeds(tokenizer, spec, texts, labels)
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
                for label, chosen in batches(len(self.prompts), bucket.batch):
                    self.progress(f"denoiser {bucket}: reference trajectory, {label}")
                    positives = [conditions[self.prompts[i]] for i in chosen]
                    scales = {"guidance": self.bundle.default_guidance, **SCALES}
                    empty = conditions[""] if self.guided else None
                    inputs = start_inputs(spec, bucket, tables[bucket], positives, empty, scales)
                    generators = self._generators(bucket.batch)
                    recorded, latents = trajectory(module, spec, tables[bucket], inputs, generators, label)
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

    def _generators(self, batch: int) -> list[Generator]:
        """Another seed for each row, so that two rows that changed places are seen even where prompts repeat."""
        first = self.bundle.recipe.check.seeds[0]
        return [Generator((first + row) % 2**64) for row in range(batch)]
