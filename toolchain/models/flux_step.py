"""Torch wrapper of FLUX's denoising step. Only imported when something is exported or compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from toolchain.models.step import begin, finish, guide, unused


class FluxStep(nn.Module):
    """One denoising step of FLUX.1: scaling, packing, network, true guidance where wanted, unpacking and update.

    guided    whether the batch is doubled for classifier-free guidance with the scale `true_cfg`
    embedded  whether the network takes `guidance` as an input (dev); schnell has no use for it
    """

    def __init__(self, transformer: nn.Module, guided: bool, embedded: bool, dtype: str) -> None:
        super().__init__()
        ids: Any = transformer.pos_embed
        self.axes, self.theta = tuple(ids.axes_dim), float(ids.theta)
        self.rotary = transformer.pos_embed = _Rotary(ids)
        self.transformer = transformer
        self.guided = guided
        self.embedded = embedded
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(
        self,
        state: Tensor,
        step: Tensor,
        timesteps: Tensor,
        table: Tensor,
        noise: Tensor,
        guidance: Tensor,
        context: Tensor,
        pooled: Tensor,
        true_cfg: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation: the next state [D, B, C, h, w] float32 and the next step [1] int64."""
        row, latents, time = begin(state, step, timesteps, table, self.guided, self.dtype)
        rows, _, height, width = latents.shape
        text, image = context.shape[1], height // 2 * (width // 2)
        self.rotary.tables = rotary_tables(self.axes, self.theta, text, height // 2, width // 2)
        packed: Tensor = self.transformer(
            hidden_states=pack(latents),
            # The network multiplies by 1000 again: in its own precision, as in diffusers, where rounding shows.
            timestep=time.to(self.dtype) / 1000,
            guidance=guidance.expand(rows) if self.embedded else None,
            pooled_projections=pooled.to(self.dtype),
            encoder_hidden_states=context.to(self.dtype),
            # Only concatenated, for their values went into the tables.
            txt_ids=torch.zeros(text, 3),
            img_ids=torch.zeros(image, 3),
            return_dict=False,
        )[0]
        self.rotary.tables = None
        output = unpack(packed, height, width)
        output = output.float() if true_cfg is None else guide(output, true_cfg)
        if not self.embedded:
            output = output + unused(guidance)
        return finish(row, state, step, output, unpack(noise, height, width))


class _Rotary(nn.Module):
    """Around diffusers' FluxPosEmbed: within a step it gives `tables`, which the step sets, whatever the ids.

    FluxPosEmbed computes them in float64 at each evaluation. Set from outside they are constants of the graph, whose
    size is known to nobody but the step. The network is also a part of the reference pipeline, which knows no step.
    """

    def __init__(self, embed: nn.Module) -> None:
        super().__init__()
        self.embed = embed
        self.tables: tuple[Tensor, Tensor] | None = None

    def forward(self, ids: Tensor) -> Any:
        return self.embed(ids) if self.tables is None else self.tables


def rotary_tables(axes: Sequence[int], theta: float, text: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [text + height * width, sum(axes)] float32: text at position 0, then the image row by row.

    As FluxPosEmbed of the pipeline's ids. Made by numpy, for what torch makes under fake tensors has no values.
    """
    positions = np.zeros((text + height * width, len(axes)))
    positions[text:, 1:] = np.indices((height, width)).reshape(2, -1).T
    angles = [np.outer(positions[:, i], 1 / theta ** (np.arange(0, size, 2) / size)) for i, size in enumerate(axes)]
    both = np.concatenate(angles, axis=1).repeat(2, axis=1)
    cosines, sines = np.cos(both).astype(np.float32), np.sin(both).astype(np.float32)
    return torch.from_numpy(cosines), torch.from_numpy(sines)


def pack(latents: Tensor) -> Tensor:
    """[B, C, h, w] -> [B, h/2 * w/2, 4C]: one token for every 2x2 latents."""
    rows, channels, height, width = latents.shape
    latents = latents.reshape(rows, channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return latents.reshape(rows, height // 2 * (width // 2), 4 * channels)


def unpack(tokens: Tensor, height: int, width: int) -> Tensor:
    """[B, h/2 * w/2, 4C] -> [B, C, h, w]"""
    rows, _, channels = tokens.shape
    tokens = tokens.reshape(rows, height // 2, width // 2, channels // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return tokens.reshape(rows, channels // 4, height, width)
