"""Inputs of components from real denoising trajectories of the reference."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from toolchain.check.measure import Arrays, Feed, call
from toolchain.engines.buffers import HostMemory
from toolchain.recipe import Bucket
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
RECORDED = 7
"""Evaluations of each trajectory that are compared: enough for a curve, and a third of a usual schedule."""


def text_feeds(tokenizer: PromptTokenizer, spec: GraphSpec, texts: Sequence[str], labels: Sequence[str]) -> list[Feed]:
    """The inputs of a text encoder for each text."""
    feeds = []
    for label, encoded in zip(labels, map(tokenizer.encode, texts), strict=True):
        given = {"ids": encoded.ids, "mask": encoded.mask, "clip_skip": np.zeros(1, np.int64)}
        feeds.append(Feed(label, {t.name: given[t.name] for t in spec.inputs}))
    return feeds


def start_inputs(
    spec: GraphSpec,
    bucket: Bucket,
    table: SamplerTable,
    conditions: list[Conditions],
    empty: Conditions | None,
    scales: Mapping[str, float],
) -> Arrays:
    """Inputs of the denoiser's first evaluation but for state and noise, as the runtime fills its buffers.

    empty   conditions of the unconditional rows; None where there are none
    scales  of guidance, as far as the step has them
    """
    inputs: Arrays = {t.name: np.zeros(t.shape, t.dtype) for t in spec.inputs}
    place_sampler(HOST, inputs, table)
    place_scales(HOST, inputs, scales)
    sizes = (bucket.height, bucket.width, 0, 0, bucket.height, bucket.width)
    place_time_ids(HOST, inputs, sizes, sizes)
    place(HOST, inputs, [] if empty is None else [empty] * len(conditions), conditions)
    return inputs


def batches(prompts: int, batch: int) -> Iterator[tuple[str, list[int]]]:
    """Prompts in groups of `batch`, each with its label; the last group repeats its last prompt."""
    for first in range(0, prompts, batch):
        last = min(first + batch, prompts) - 1
        label = f"prompt {first + 1}" if last == first else f"prompts {first + 1}-{last + 1}"
        yield label, [min(first + row, last) for row in range(batch)]


def _recorded(evaluations: int) -> set[int]:
    """Which evaluations of a trajectory are compared: RECORDED of them, evenly spaced, the first and the last too."""
    intervals = RECORDED - 1
    return {(2 * i * (evaluations - 1) + intervals) // (2 * intervals) for i in range(RECORDED)}


def trajectory(
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
