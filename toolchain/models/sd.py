"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross attention, an 8x VAE."""

from __future__ import annotations

from toolchain.models import checks, vae
from toolchain.models.component import Family
from toolchain.models.sd_components import CHECKER, COMPONENTS, scheduler_config
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import clip_layers
from toolchain.recipe import Recipe
from toolchain.settings import ModelSettings

CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": checks.CLIP_TOKENIZERS,
}


def check(source: ModelSource, recipe: Recipe) -> None:
    """Checks the configs. ModelError for what the graphs do not cover, RecipeError where the recipe does not fit."""
    checks.check_classes(source, CLASSES)
    latent_channels = source.setting("vae", "latent_channels")
    checks.check_vae(source, vae.scaled)
    checks.check_clip(source, "text_encoder", "unet")
    checks.refuse_unet_settings(source, checks.FOREIGN_UNET_SETTINGS, "sd")
    checks.check_channels(source, "unet", latent_channels)
    checks.check_unet_output(source, latent_channels)
    width = source.setting("text_encoder", "hidden_size")
    checks.check_equal(source, "unet", "cross_attention_dim", width, "the text encoder's hidden_size")
    checks.check_safety_checker(source, recipe)


def settings(source: ModelSource) -> ModelSettings:
    """The settings of the model that the runtime needs."""
    factor = vae.vae_factor(source)
    return ModelSettings(
        scheduler=scheduler_config(source),
        vae_factor=factor,
        multiple=factor,
        token_pixels=factor,
        max_clip_skip=clip_layers(source, "text_encoder"),
    )


SD = Family(
    name="sd",
    pipeline="StableDiffusionPipeline",
    others=(
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInpaintPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionControlNetImg2ImgPipeline",
        "StableDiffusionControlNetInpaintPipeline",
        "StableDiffusionAdapterPipeline",
        "StableDiffusionPAGPipeline",
        "StableDiffusionPAGImg2ImgPipeline",
        "StableDiffusionPAGInpaintPipeline",
        "StableDiffusionControlNetPAGPipeline",
        "StableDiffusionControlNetPAGInpaintPipeline",
    ),
    components=COMPONENTS,
    check=check,
    settings=settings,
    checker=CHECKER,
)
