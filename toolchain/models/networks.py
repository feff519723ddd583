"""Networks of diffusers and transformers: made from a config alone, or loaded with a checkpoint's weights."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn


def make_network(source: ModelSource, folder: str, cls: str, recipe: Recipe, component: str) -> nn.Module:
    """A diffusers model from its config alone, in the recipe's precision."""
    import diffusers

    from toolchain.models.construct import construct

    config, precision = source.config(folder), recipe.component(component)
    return construct(
        lambda: getattr(diffusers, cls).from_config(config), precision.dtype, precision.keep_float32, component
    )


def load_network(source: ModelSource, folder: str, cls: str) -> nn.Module:
    """A diffusers model with the checkpoint's weights in float32."""
    import diffusers

    return load_weights(getattr(diffusers, cls), source, folder)


def load_weights(cls: Any, source: ModelSource, folder: str, **options: Any) -> nn.Module:
    """A model of the class `cls`, of diffusers or transformers, with the checkpoint's weights in float32."""
    import torch

    module: nn.Module = cls.from_pretrained(
        source.path / folder, dtype=torch.float32, use_safetensors=True, variant=source.variant(folder), **options
    )
    return module.eval()
