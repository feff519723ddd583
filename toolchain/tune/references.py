"""The components of a model with inputs from its own trajectories, loaded one at a time and only when asked for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from toolchain.builder.plan import Plan, execute
from toolchain.builder.steps import StepId
from toolchain.check.feeds import batches, start_inputs, text_feeds, trajectory
from toolchain.check.measure import Feed, call
from toolchain.check.reference import reference_module
from toolchain.runtime.noise import Generator
from toolchain.runtime.prompt import PromptTokenizer
from toolchain.runtime.text import Conditions
from toolchain.sampler.compile import compile_table
from toolchain.sampler.schedulers import parse, steps_of
from toolchain.sampler.table import SamplerTable
from toolchain.signature import GraphSpec
from toolchain.tune.simulation import Simulation

if TYPE_CHECKING:
    from torch import nn

Progress = Callable[[str], None]


class References:
    """Of the first bucket of a plan, whose engines are not used: it may be one for another machine.

    prompts  one trajectory for each, with the noise of the seed of its place
    """

    def __init__(self, plan: Plan, prompts: Sequence[str], seed: int, progress: Progress) -> None:
        self.plan, self.source, self.family, self.recipe = plan, plan.source, plan.family, plan.recipe
        self.prompts, self.seed, self.progress = list(prompts), seed, progress
        self.bucket = plan.recipe.buckets[0]
        self.settings = plan.family.settings(plan.source)
        self._opened = ExitStack()
        self._module: tuple[str, nn.Module] | None = None

    @cached_property
    def table(self) -> SamplerTable:
        """Of the sampler that trajectories follow, the recipe's. SamplerError where it cannot be compiled."""
        sampling, settings = self.recipe.sampling, self.settings
        spec = parse(sampling.scheduler)
        return compile_table(
            spec.canonical,
            steps_of(spec, settings.scheduler, sampling.steps),
            settings.scheduler,
            tokens=settings.tokens(self.bucket.height, self.bucket.width),
            linear_sigmas=settings.linear_sigmas,
        )

    def close(self) -> None:
        """Frees the module that is loaded."""
        self._opened.close()
        self._module = None

    def simulation(self, name: str) -> Simulation:
        """A component on its inputs; the one that was loaded before is freed. ModelError where it cannot be loaded."""
        feeds = self.feeds(name)
        return Simulation(self.family.component(name), self._load(name), self._spec(name), feeds, self.table)

    def reference(self, name: str) -> tuple[nn.Module, GraphSpec, list[Feed]]:
        """A component's module, its signature and its inputs; the one that was loaded before is freed."""
        feeds = self.feeds(name)
        return self._load(name), self._spec(name), feeds

    def feeds(self, name: str) -> list[Feed]:
        """The inputs of a text encoder, of the denoiser or of half a VAE."""
        if self.family.component(name).tokenizer is not None:
            return self._text_feeds(name)
        if name == "vae_encoder":
            return self._pictures
        return self._trajectories[0 if name == "denoiser" else 1]

    def _spec(self, name: str) -> GraphSpec:
        return self.family.component(name).spec(self.source, self.bucket, self.recipe)

    def _load(self, name: str) -> nn.Module:
        if self._module is None or self._module[0] != name:
            self.close()
            self.progress(f"{name}: loading the reference")
            component = self.family.component(name)
            module = self._opened.enter_context(reference_module(component, self.source, self.recipe))
            self._module = name, module
        return self._module[1]

    @cached_property
    def _tokenizers(self) -> dict[str, PromptTokenizer]:
        """By the text encoder; built where the store has them not."""
        steps = tuple(step for step in self.plan.steps if step.stage == "tokenizer")
        built = execute(replace(self.plan, steps=steps, refused=None), lambda step, what: None)
        encoders = [c for c in self.family.parts(self.recipe) if c.tokenizer]
        return {c.name: PromptTokenizer(built[StepId("tokenizer", str(c.tokenizer))].path) for c in encoders}

    def _text_feeds(self, name: str) -> list[Feed]:
        texts = [*self.prompts, ""]
        return text_feeds(self._tokenizers[name], self._spec(name), texts, texts)

    @cached_property
    def _conditions(self) -> dict[str, Conditions]:
        """By the text."""
        conditions: dict[str, Conditions] = {text: {} for text in (*self.prompts, "")}
        for name in self._tokenizers:
            module = self._load(name)
            for feed in self._text_feeds(name):
                outputs = call(module, self._spec(name), feed.inputs)
                conditions[feed.label] |= {key: value[0] for key, value in outputs.items()}
        return conditions

    @cached_property
    def _trajectories(self) -> tuple[list[Feed], list[Feed]]:
        """Some evaluations of the denoiser along each, and the decoder's input at its end."""
        conditions, module = self._conditions, self._load("denoiser")
        spec, steps, ends = self._spec("denoiser"), [], []
        guided = self.recipe.classifier_free_guidance
        empty = conditions[""] if guided else None
        guidance = self.recipe.sampling.guidance if guided or self.settings.embedded_guidance else 1.0
        for label, chosen in batches(len(self.prompts), self.bucket.batch):
            self.progress(f"denoiser: reference trajectory, {label} of {len(self.prompts)}")
            positives = [conditions[self.prompts[i]] for i in chosen]
            inputs = start_inputs(spec, self.bucket, self.table, positives, empty, {"guidance": guidance})
            generators = [Generator(self.seed + i) for i in chosen]
            recorded, latents = trajectory(module, spec, self.table, inputs, generators, label)
            steps += recorded
            ends.append(Feed(label, {"latents": latents}))
        return steps, ends

    @cached_property
    def _pictures(self) -> list[Feed]:
        """The encoder's inputs: what the decoder gives at the end of each trajectory."""
        ends = self._trajectories[1]
        module, spec = self._load("vae_decoder"), self._spec("vae_decoder")
        feeds = []
        for end in ends:
            draws = {name: np.zeros_like(end.inputs["latents"]) for name in ("noise", "start_noise")}
            scales = {"signal": np.ones(1, np.float32), "sigma": np.zeros(1, np.float32)}
            feeds.append(Feed(end.label, {"pixels": call(module, spec, end.inputs)["pixels"], **draws, **scales}))
        return feeds
