"""Torch wrappers that the families export: what happens around a network is compiled together with it.

Only imported when something is exported or compared, never for planning.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toolchain.errors import RecipeError
from toolchain.models.vae import Factor
from toolchain.sampler.table import LAYOUTS


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
        own, out, limit, into = row.clamp
        estimate = own * state[0].reshape(1, -1) + out * output.float().reshape(1, -1)
        # Maximum and minimum, because TensorRT's clamp takes its bounds as constants.
        flat = flat + into[:, None] * torch.minimum(torch.maximum(estimate, -limit), limit)
    return flat.reshape(state.shape)


class Evaluation(NamedTuple):
    """What the network is given: latents [B, ...] or, guided, [2B, ...] in its dtype; time [B] or [2B] float32."""

    row: Row
    latents: Tensor
    time: Tensor


def begin(
    state: Tensor, step: Tensor, timesteps: Tensor, table: Tensor, guided: bool, dtype: torch.dtype
) -> Evaluation:
    """The step until the network: the sample scaled, and doubled for classifier-free guidance."""
    row = table_row(table, step)
    latents = (state[0] * row.scale).to(dtype)
    if guided:
        latents = torch.cat([latents, latents])
    return Evaluation(row, latents, timesteps.index_select(0, step).expand(latents.shape[0]))


def finish(row: Row, state: Tensor, step: Tensor, output: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """The step after the network and its guidance: the next state and the next step."""
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
    """What UNet families make of the network's output: guided and rescaled where the batch is doubled; in float32."""
    if guided:
        return rescale(output, guide(output, guidance), guidance_rescale)
    return output.float() + unused(guidance, guidance_rescale)


def unused(*inputs: Tensor) -> Tensor:
    """Zero, made of the inputs that a graph has only so that every graph of its family has the same signature."""
    return 0 * torch.stack([x.float().sum() for x in inputs]).sum()


class UNetStep(nn.Module):
    """One denoising step of SD 1.x and 2.x: scaling, guidance batch, network, guidance and update."""

    def __init__(self, unet: nn.Module, guided: bool, dtype: str) -> None:
        super().__init__()
        self.unet = unet
        self.guided = guided
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(
        self,
        state: Tensor,
        step: Tensor,
        timesteps: Tensor,
        table: Tensor,
        noise: Tensor,
        guidance: Tensor,
        guidance_rescale: Tensor,
        context: Tensor,
    ) -> tuple[Tensor, Tensor]:
        row, latents, time = begin(state, step, timesteps, table, self.guided, self.dtype)
        output = self.unet(latents, time, context.to(self.dtype), return_dict=False)[0]
        output = guide_unet(output, self.guided, guidance, guidance_rescale)
        return finish(row, state, step, output, noise)


class ClipTextEncoder(nn.Module):
    """Token ids [1, L] int64 -> a hidden state [1, L, E] and the pooled output [1, P], each where wanted, in float32.

    layer     the hidden state to take, counted from the last, which is 1; `clip_skip` [1] int64 counts on from there.
              None: no hidden state and no input clip_skip
    normed    whether the final layer norm is applied to it
    pooled    whether the pooled output is wanted: projected where the model has a projection

    mask [1, L] int64, where it is given, is 0 for padding, which no token attends to then.
    """

    def __init__(self, text: nn.Module, *, layer: int | None, normed: bool, pooled: bool) -> None:
        super().__init__()
        self.text = text
        self.layer = layer
        self.normed = normed
        self.pooled = pooled

    def forward(
        self, ids: Tensor, clip_skip: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        # Given here, because the model's own are a buffer, which has no values under fake tensors.
        positions = torch.arange(ids.shape[1])[None]
        output = self.text(
            ids, attention_mask=mask, position_ids=positions, output_hidden_states=self.layer is not None
        )
        pooled: Tensor = output.text_embeds if "text_embeds" in output else output.pooler_output
        if self.layer is None:
            return pooled.float()
        assert clip_skip is not None
        # All layers are there anyway: choosing one inside the graph makes clip skip an option of each request.
        states = torch.cat(output.hidden_states)
        hidden = states.index_select(0, states.shape[0] - self.layer - clip_skip)
        if self.normed:
            norm = self.text.get_submodule(_final_norm(self.text))
            # A layer kept in float32 records its state before the cast that goes on to the next layer.
            hidden = norm(hidden.to(next(norm.parameters()).dtype))
        return (hidden.float(), pooled.float()) if self.pooled else hidden.float()


def _final_norm(text: nn.Module) -> str:
    """Where the final layer norm lies, which differs between releases of transformers."""
    return str(next(name for name, _ in text.named_modules() if name.endswith("final_layer_norm")))


class T5TextEncoder(nn.Module):
    """Token ids [1, L] int64 -> last hidden state [1, L, E] float32."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.text(ids)[0]
        return hidden.float()


def per_channel(factor: Factor) -> float | Tensor:
    """A factor of latents [B, C, h, w]. Made by numpy, for what torch makes under fake tensors has no values."""
    if isinstance(factor, float):
        return factor
    return torch.from_numpy(np.array(factor, np.float32).reshape(1, -1, 1, 1))


class VaeEncoder(nn.Module):
    """Pixels [B, H, W, 3] uint8 -> what image to image starts from: noised latents [B, C, h, w] float32.

    noise        [B, C, h, w] float32, standard normal: samples the posterior, as diffusers does with the request's
                 generator
    start_noise  [B, C, h, w] float32, standard normal
    signal       [1] float32: what the scaled latents are multiplied with
    sigma        [1] float32: what the start noise is
    """

    def __init__(self, vae: nn.Module, scaling_factor: Factor, shift_factor: Factor, dtype: str) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(self, pixels: Tensor, noise: Tensor, start_noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        image = (2 * (pixels.float() / 255) - 1).permute(0, 3, 1, 2)
        posterior = self.vae.encode(image.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        sample: Tensor = posterior.mean.float() + posterior.std.float() * noise
        latents = (sample - per_channel(self.shift_factor)) * per_channel(self.scaling_factor)
        return signal * latents + sigma * start_noise


class VaeDecoder(nn.Module):
    """Latents [B, C, h, w] float32 -> pixels [B, H, W, 3] uint8, and the same before rounding as float32 in [0, 1]."""

    def __init__(self, vae: nn.Module, scaling_factor: Factor, shift_factor: Factor, dtype: str) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        latents = latents / per_channel(self.scaling_factor) + per_channel(self.shift_factor)
        decoded: Tensor = self.vae.decode(latents.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        image = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (image * 255).round().to(torch.uint8), image


def construct(make: Callable[[], nn.Module], dtype: str, keep_float32: Sequence[str], component: str) -> nn.Module:
    """A network built in `dtype`, the modules that match `keep_float32` in float32 with casts around them.

    The dtype is set as torch's default while building: `.to(dtype)` fails under fake tensors. Every pattern must match
    a module, else RecipeError. Inside a kept module everything is float32, so that a match there changes nothing.

    What holds a module that the network's own library keeps in float32 gives float32, as its caller there expects: T5
    adds up its blocks in float32 then, where float16 would overflow.
    """
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        module = make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    if dtype == "float32":
        return module
    low = getattr(torch, dtype)
    _narrow_buffers(module, low)
    names = [name for name, _ in module.named_modules() if name]
    kept: set[str] = set()
    for pattern in keep_float32:
        matched = [name for name in names if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise RecipeError(
                "a pattern matches no module",
                where=f"components.{component}.keep_float32",
                expected="names of modules such as " + ", ".join(n for n, _ in list(module.named_children())[:6]),
                got=pattern,
            )
        kept.update(matched)
    wide = set(getattr(module, "_keep_in_fp32_modules", None) or ())
    for name in kept:
        if not any(name.startswith(f"{other}.") for other in kept):
            inside = {part.rpartition(".")[2] for part in names if part == name or part.startswith(f"{name}.")}
            _keep_float32(module.get_submodule(name), low, torch.float32 if inside & wide else low)
    return module


def _narrow_buffers(module: nn.Module, low: torch.dtype) -> None:
    """Buffers of the checkpoint in the network's dtype, as the libraries load them: SD3's positions are large."""
    persistent = module.state_dict(keep_vars=True).keys()
    for name, buffer in list(module.named_buffers()):
        if name in persistent and buffer.is_floating_point():
            owner, _, own = name.rpartition(".")
            module.get_submodule(owner)._buffers[own] = buffer.to(low)


def _keep_float32(module: nn.Module, low: torch.dtype, out: torch.dtype) -> None:
    """`low`: the dtype around the module; `out`: of what it gives."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # never called itself, so that no hook of it would run
        for child in module.children():
            _keep_float32(child, low, out)
        return
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), False)
        for name, buffer in part._buffers.items():
            if buffer is not None and buffer.dtype == low:
                part._buffers[name] = buffer.float()

    # Blocks take and return tuples, and diffusers' and transformers' output classes: both register these as trees.
    def cast(tree: Any, dtype: torch.dtype) -> Any:
        return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cast(args, torch.float32), cast(kwargs, torch.float32)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return cast(output, out)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
