"""Torch wrappers that the families export: what happens around a network is compiled together with it.

Only imported when something is exported or compared, never for planning.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toolchain.errors import RecipeError
from toolchain.sampler.table import MAX_STATES

D = MAX_STATES


def table_row(table: Tensor, step: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A [D, D], b [D], c [D] and the input scale (scalar) of row `step` [1] of `table` [S, D*D + 2D + 1]."""
    row = table.index_select(0, step)[0]
    a, b, c, scale = row.split([D * D, D, D, 1])  # type: ignore[no-untyped-call]
    return a.reshape(D, D), b, c, scale


def advance(row: tuple[Tensor, Tensor, Tensor, Tensor], state: Tensor, output: Tensor, noise: Tensor) -> Tensor:
    """The sampler's update A state + b e + c z in float32; `state` is [D, B, *latent], the others [B, *latent]."""
    a, b, c, _ = row
    flat = a @ state.reshape(D, -1)
    flat = flat + b[:, None] * output.float().reshape(1, -1) + c[:, None] * noise.reshape(1, -1)
    return flat.reshape(state.shape)


def guide(output: Tensor, guidance: Tensor) -> Tensor:
    """Classifier-free guidance over a batch whose first half is unconditional: [2B, ...] -> [B, ...] in float32."""
    unconditional, conditional = output.float().chunk(2)
    return unconditional + guidance * (conditional - unconditional)


class UNetStep(nn.Module):
    """One denoising step of a UNet family: scaling, guidance batch, network, guidance and update."""

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
        context: Tensor,
    ) -> tuple[Tensor, Tensor]:
        row = table_row(table, step)
        latents = (state[0] * row[3]).to(self.dtype)
        if self.guided:
            latents = torch.cat([latents, latents])
        time = timesteps.index_select(0, step).expand(latents.shape[0])
        output = self.unet(latents, time, context.to(self.dtype), return_dict=False)[0]
        # Without guidance the input still exists, so that every step graph has the same signature.
        output = guide(output, guidance) if self.guided else output.float() + 0 * guidance
        return advance(row, state, output, noise), step + 1


class ClipTextEncoder(nn.Module):
    """Token ids [1, L] int64 -> last hidden state [1, L, E] float32, after the final layer norm."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> Tensor:
        hidden: Tensor = self.text(ids)[0]
        return hidden.float()


class VaeDecoder(nn.Module):
    """Latents [B, C, h, w] float32 -> pixels [B, H, W, 3] uint8, and the same before rounding as float32 in [0, 1]."""

    def __init__(self, vae: nn.Module, scaling_factor: float, shift_factor: float, dtype: str) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        latents = latents / self.scaling_factor + self.shift_factor
        decoded: Tensor = self.vae.decode(latents.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        image = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (image * 255).round().to(torch.uint8), image


def construct(make: Callable[[], nn.Module], dtype: str, keep_float32: Sequence[str], component: str) -> nn.Module:
    """A network built in `dtype`, the modules that match `keep_float32` in float32 with casts around them.

    The dtype is set as torch's default while building: `.to(dtype)` fails under fake tensors. Every pattern must match
    a module, else RecipeError. Inside a kept module everything is float32, so that a match there changes nothing.
    """
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        module = make().eval().requires_grad_(False)
    finally:
        torch.set_default_dtype(torch.float32)
    if dtype == "float32":
        return module
    low = getattr(torch, dtype)
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
    for name in kept:
        if not any(name.startswith(f"{other}.") for other in kept):
            _keep_float32(module.get_submodule(name), low)
    return module


def _keep_float32(module: nn.Module, low: torch.dtype) -> None:
    if isinstance(module, nn.ModuleList | nn.ModuleDict):  # never called itself, so that no hook of it would run
        for child in module.children():
            _keep_float32(child, low)
        return
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, dtype=torch.float32), False)

    # Blocks take and return tuples, and diffusers' and transformers' output classes: both register these as trees.
    def cast(tree: Any, dtype: torch.dtype) -> Any:
        return pytree.tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x, tree)

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return cast(args, torch.float32), cast(kwargs, torch.float32)

    def after(_: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return cast(output, low)

    module.register_forward_pre_hook(before, with_kwargs=True)
    module.register_forward_hook(after)
