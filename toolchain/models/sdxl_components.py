"""What is compiled of Stable Diffusion XL: its components, and nothing else of the family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.models.component import Component
from toolchain.models.denoiser import denoiser
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import clip_length, clip_text_encoder
from toolchain.models.vae import normalised, vae_decoder, vae_encoder
from toolchain.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

ENCODERS = ("text_encoder", "text_encoder_2")
# Original height and width, top and left of the crop, target height and width.
TIME_IDS = 6
# The hidden state that both text encoders give, counted from the last.
PENULTIMATE = 2


def _inputs(source: ModelSource, recipe: Recipe, rows: int) -> dict[str, tuple[int, ...]]:
    length = clip_length(source, "text_encoder")
    widths = [int(source.setting(folder, "hidden_size")) for folder in ENCODERS]
    return {
        "guidance_rescale": (1,),
        "context": (rows, length, widths[0]),
        "context_2": (rows, length, widths[1]),
        "pooled": (rows, int(source.setting("text_encoder_2", "projection_dim"))),
        "time_ids": (rows, TIME_IDS),
    }


def _step(unet: nn.Module, source: ModelSource, recipe: Recipe, dtype: str) -> nn.Module:
    from toolchain.models.sdxl_step import SDXLStep

    return SDXLStep(unet, recipe.classifier_free_guidance, dtype)


COMPONENTS: tuple[Component, ...] = (
    clip_text_encoder("text_encoder", cls="CLIPTextModel", layer=PENULTIMATE, context="context"),
    clip_text_encoder(
        "text_encoder_2", cls="CLIPTextModelWithProjection", layer=PENULTIMATE, context="context_2", pooled="pooled"
    ),
    denoiser("unet", cls="UNet2DConditionModel", inputs=_inputs, wrap=_step),
    vae_decoder(normalised),
    vae_encoder(normalised),
)
