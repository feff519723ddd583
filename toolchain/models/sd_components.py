"""What is compiled of Stable Diffusion 1.x and 2.x: its components, and nothing else of the family."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.models.component import Component
from toolchain.models.denoiser import denoiser
from toolchain.models.safety import safety_checker
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import clip_length, clip_text_encoder
from toolchain.models.vae import scaled, vae_decoder, vae_encoder
from toolchain.recipe import Recipe
from toolchain.sampler.layout import DEFAULTED

if TYPE_CHECKING:
    from torch import nn


def scheduler_config(source: ModelSource) -> dict[str, Any]:
    """The scheduler's config as StableDiffusionPipeline's constructor leaves it: it sets steps_offset to 1 and turns
    clip_sample off, whatever the file says. What the file is silent about it changes for the model's own class alone:
    another class made from this config takes its own default."""
    config = source.config("scheduler")
    forced = {"steps_offset": 1, "clip_sample": False}
    silent = sorted(forced.keys() - config.keys())
    return config | forced | ({DEFAULTED: silent} if silent else {})


def _inputs(source: ModelSource, recipe: Recipe, rows: int) -> dict[str, tuple[int, ...]]:
    width = int(source.setting("text_encoder", "hidden_size"))
    return {"guidance_rescale": (1,), "context": (rows, clip_length(source, "text_encoder"), width)}


def _step(unet: nn.Module, source: ModelSource, recipe: Recipe, dtype: str) -> nn.Module:
    from toolchain.models.sd_step import UNetStep

    return UNetStep(unet, recipe.classifier_free_guidance, dtype)


COMPONENTS: tuple[Component, ...] = (
    clip_text_encoder("text_encoder", cls="CLIPTextModel", layer=1, normed=True, context="context", masks=True),
    denoiser("unet", cls="UNet2DConditionModel", inputs=_inputs, wrap=_step, scheduler=scheduler_config),
    vae_decoder(scaled),
    vae_encoder(scaled),
)
CHECKER = safety_checker()
