"""A network from its config, in the precision that the recipe asks for. Imports torch: only for an export."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from toolchain.errors import RecipeError


def construct(make: Callable[[], nn.Module], dtype: str, keep_float32: Sequence[str], component: str) -> nn.Module:
    """A network built in `dtype`, the modules that match `keep_float32` in float32 with casts around them.

    The dtype is set as torch's default while building: `.to(dtype)` fails under fake tensors. Every pattern must match
    a module, else RecipeError. Inside a kept module everything is float32, so that a match there changes nothing.

    A kept module with a part that the network's library itself keeps in float32 returns float32, as its caller there
    expects: T5 then adds up its blocks in float32, where float16 would overflow.
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
            parent, _, attribute = name.rpartition(".")
            module.get_submodule(parent)._buffers[attribute] = buffer.to(low)


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
