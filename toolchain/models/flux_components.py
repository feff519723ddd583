"""What is compiled of FLUX.1 dev and schnell: its components, and nothing else of the family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.models.component import Component
from toolchain.models.denoiser import denoiser
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import clip_text_encoder, t5_text_encoder
from toolchain.models.vae import shifted, vae_decoder, vae_encoder
from toolchain.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

PATCH = 2
"""Latents per token of the network, along each side."""
T5_TOKENS = 512
"""The pipeline's default and the most that it allows."""


def embeds_guidance(source: ModelSource) -> bool:
    """Whether the network was distilled with its guidance as an input: dev, not schnell."""
    return bool(source.config("transformer").get("guidance_embeds"))


def _inputs(source: ModelSource, recipe: Recipe, rows: int) -> dict[str, tuple[int, ...]]:
    tokens = recipe.component("text_encoder_2").tokens or T5_TOKENS
    inputs: dict[str, tuple[int, ...]] = {
        "context": (rows, tokens, int(source.setting("text_encoder_2", "d_model"))),
        "pooled": (rows, int(source.setting("text_encoder", "hidden_size"))),
    }
    return inputs | {"true_cfg": (1,)} if recipe.classifier_free_guidance else inputs


def _packed(latents: tuple[int, int, int, int]) -> tuple[int, int, int]:
    """The pipeline keeps its latents packed, and schedulers draw their noise in the shape of what they are given."""
    batch, channels, height, width = latents
    return batch, height // PATCH * (width // PATCH), channels * PATCH * PATCH


def _step(transformer: nn.Module, source: ModelSource, recipe: Recipe, dtype: str) -> nn.Module:
    from toolchain.models.flux_step import FluxStep

    return FluxStep(transformer, recipe.classifier_free_guidance, embeds_guidance(source), dtype)


COMPONENTS: tuple[Component, ...] = (
    clip_text_encoder("text_encoder", cls="CLIPTextModel", layer=None, pooled="pooled"),
    t5_text_encoder("text_encoder_2", context="context", tokens=T5_TOKENS, optional=False),
    denoiser("transformer", cls="FluxTransformer2DModel", inputs=_inputs, wrap=_step, noise=_packed),
    vae_decoder(shifted),
    vae_encoder(shifted),
)
