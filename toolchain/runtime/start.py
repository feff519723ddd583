"""What a run starts from: initial latents, and everything that its steps read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from toolchain.engines.buffers import Memory
from toolchain.errors import RequestError
from toolchain.runtime.engines import F32, BucketEngines
from toolchain.runtime.noise import Generator
from toolchain.runtime.request import Request
from toolchain.sampler.layout import LAYOUTS, MAX_EVALUATIONS
from toolchain.sampler.table import SamplerTable, fit


def upload(
    engines: BucketEngines, table: SamplerTable, request: Request, chosen: list[int], generators: list[Generator]
) -> None:
    """Everything that the steps of one run read beside the conditions, for the pictures `chosen`: after this the loop
    only launches."""
    memory, inputs = engines.memory, engines.inputs
    _place_start(engines, table, request, chosen, generators)
    memory.write(engines.states[0][1:], 0)
    memory.write(engines.counters[0], 0)
    memory.write(inputs["noise"], 0)
    place_sampler(memory, inputs, table)
    scales = {
        "guidance": request.guidance,
        "guidance_rescale": request.guidance_rescale,
        "true_cfg": request.true_cfg,
    }
    place_scales(memory, inputs, scales)
    place_time_ids(memory, inputs, *request.time_ids)


def _place_start(
    engines: BucketEngines, table: SamplerTable, request: Request, chosen: list[int], generators: list[Generator]
) -> None:
    """The latents [B, C, h, w] before the first step: noise, or a noised image."""
    memory, start = engines.memory, engines.states[0][0]
    shape = engines.latent_shape
    if request.images is not None:
        memory.copy(start, _noised_image(engines, table, request, chosen, generators))
        return
    if request.latents is None:
        noise = normal(shape, generators)
    elif request.latents.shape != (len(request.prompts), *shape[1:]):
        raise RequestError(
            "the latents have another shape than the bucket",
            expected=(len(request.prompts), *shape[1:]),
            got=request.latents.shape,
        )
    else:
        noise = request.latents[chosen]
    memory.write(start, noise * np.float32(table.init_noise_sigma))


def _noised_image(
    engines: BucketEngines, table: SamplerTable, request: Request, chosen: list[int], generators: list[Generator]
) -> Any:
    if table.noising is None:
        raise RequestError(
            "this scheduler cannot noise an image", got=table.name, hint="take another one, such as euler or dpm++2m"
        )
    assert engines.encoder is not None
    assert request.images is not None
    # The order of the draws is diffusers': the posterior's first, then the noise.
    samplers = [
        generator if request.encoded_with[i] == i else Generator(request.seeds[request.encoded_with[i]])
        for i, generator in zip(chosen, generators, strict=True)
    ]
    posterior, noise = normal(engines.latent_shape, samplers), normal(engines.latent_shape, generators)
    signal, sigma = table.noising
    draws = {"noise": posterior, "start_noise": noise}
    return engines.encoder({"pixels": request.images[chosen], **draws, "signal": signal, "sigma": sigma})["latents"]


def place_sampler(memory: Memory, inputs: Mapping[str, Any], table: SamplerTable, first: int = 0) -> None:
    """Writes a table into the step's inputs, from evaluation `first` on as far as they have room. RequestError where
    the step cannot do what the table asks for."""
    timesteps = table.timesteps[first : first + MAX_EVALUATIONS]
    rows = fit(table.rows[first : first + MAX_EVALUATIONS], LAYOUTS[inputs["table"].shape[1]])
    memory.write(inputs["timesteps"][: len(rows)], timesteps)
    memory.write(inputs["table"][: len(rows)], rows)


def place_next(engines: BucketEngines, table: SamplerTable, first: int) -> None:
    """Before evaluation `first` of a table with more rows than the step has room for, a multiple of those."""
    place_sampler(engines.memory, engines.inputs, table, first)
    engines.memory.write(engines.counters[0], 0)  # the number of rows is even, and so the first step's turn comes next


def place_scales(memory: Memory, inputs: Mapping[str, Any], scales: Mapping[str, float]) -> None:
    """Writes the scales of guidance, as far as the step has them."""
    for name in scales.keys() & inputs.keys():
        memory.write(inputs[name], scales[name])


def place_time_ids(
    memory: Memory, inputs: Mapping[str, Any], positive: tuple[int, ...], negative: tuple[int, ...]
) -> None:
    """Writes SDXL's sizes, where the step has them; the first half of a guided batch is the negative prompts'."""
    if "time_ids" in inputs:
        rows, batch = inputs["time_ids"].shape[0], inputs["noise"].shape[0]
        if rows > batch:
            memory.write(inputs["time_ids"][: rows - batch], negative)
        memory.write(inputs["time_ids"][rows - batch :], positive)


def draw(memory: Memory, noise: Any, generators: list[Generator]) -> None:
    """Fills the buffer `noise` [B, ...], each row from its own generator."""
    memory.write(noise, normal(noise.shape, generators))


def normal(shape: tuple[int, ...], generators: list[Generator]) -> F32:
    """Standard normal noise [B, ...], each row from its own generator."""
    return np.concatenate([g.randn((1, *shape[1:])) for g in generators])
