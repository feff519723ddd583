"""What every family's denoising step does before and after its network, as functions of torch tensors.

Only imported when something is exported or compared, never for planning.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from toolchain.sampler.layout import LAYOUTS


class Row(NamedTuple):
    """One row of a table, see `toolchain.sampler.table`: A [D, D], b [D], c [D], scale (scalar), and u, v, limit (each
    [1]) and w [D] where its layout clamps."""

    a: Tensor
    b: Tensor
    c: Tensor
    scale: Tensor
    clamp: tuple[Tensor, Tensor, Tensor, Tensor] | None = None


def table_row(table: Tensor, step: Tensor) -> Row:
    """Row `step` [1] of `table` [S, width of a layout]."""
    layout = LAYOUTS[table.shape[1]]
    n = layout.states
    row = table.index_select(0, step)[0]
    if not layout.clamps:
        a, b, c, scale = row.split([n * n, n, n, 1])  # type: ignore[no-untyped-call]
        return Row(a.reshape(n, n), b, c, scale)
    a, b, c, scale, *clamp = row.split([n * n, n, n, 1, 1, 1, 1, n])  # type: ignore[no-untyped-call]
    return Row(a.reshape(n, n), b, c, scale, tuple(clamp))


def advance(row: Row, state: Tensor, output: Tensor, noise: Tensor) -> Tensor:
    """The sampler's update A state + b e + c z, and w times the clamped estimate, in float32; `state` is
    [D, B, *latent], the others [B, *latent]."""
    flat = row.a @ state.reshape(state.shape[0], -1)
    flat = flat + row.b[:, None] * output.float().reshape(1, -1) + row.c[:, None] * noise.reshape(1, -1)
    if row.clamp is not None:
        u, v, limit, w = row.clamp
        estimate = u * state[0].reshape(1, -1) + v * output.float().reshape(1, -1)
        # Maximum and minimum, because TensorRT's clamp takes its bounds as constants.
        flat = flat + w[:, None] * torch.minimum(torch.maximum(estimate, -limit), limit)
    return flat.reshape(state.shape)


class Evaluation(NamedTuple):
    """The inputs of the network: latents [B, ...] or, guided, [2B, ...] in its dtype; time [B] or [2B] float32."""

    row: Row
    latents: Tensor
    time: Tensor


def begin(
    state: Tensor, step: Tensor, timesteps: Tensor, table: Tensor, guided: bool, dtype: torch.dtype
) -> Evaluation:
    """The step before the network: scales the sample, and doubles the batch for classifier-free guidance."""
    row = table_row(table, step)
    latents = (state[0] * row.scale).to(dtype)
    if guided:
        latents = torch.cat([latents, latents])
    return Evaluation(row, latents, timesteps.index_select(0, step).expand(latents.shape[0]))


def finish(row: Row, state: Tensor, step: Tensor, output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The step after the network and its guidance: the next state and step."""
    return advance(row, state, output, noise), step + 1


def guide(output: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance over a batch whose first half is unconditional: [2B, ...] -> [B, ...] in float32."""
    unconditional, conditional = output.float().chunk(2)
    return unconditional + scale * (conditional - unconditional)


def rescale(output: Tensor, guided: Tensor, share: Tensor) -> Tensor:
    """Guidance rescale (section 3.4 of arXiv 2305.08891), as in diffusers: `output` [2B, ...], `guided` [B, ...]."""
    conditional = output.float().chunk(2)[1]
    over = list(range(1, conditional.ndim))
    ratio = conditional.std(dim=over, keepdim=True) / guided.std(dim=over, keepdim=True)
    return share * (guided * ratio) + (1 - share) * guided


def guide_unet(output: Tensor, guided: bool, guidance: Tensor, guidance_rescale: Tensor) -> Tensor:
    """Guidance of the UNet families in float32: guides and rescales a doubled batch, returns the output otherwise."""
    if guided:
        return rescale(output, guide(output, guidance), guidance_rescale)
    return output.float() + unused(guidance, guidance_rescale)


def unused(*inputs: Tensor) -> Tensor:
    """Zero, computed from inputs that a graph has only for the signature that all graphs of its family share."""
    return 0 * torch.stack([x.float().sum() for x in inputs]).sum()
