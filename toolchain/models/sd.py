"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross attention, an 8x VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError
from toolchain.models import parts, safety, vae
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe
from toolchain.sampler.schedulers import DEFAULTED
from toolchain.settings import ModelSettings
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch import nn

CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": parts.CLIP_TOKENIZERS,
}
# Settings of a UNet that change its inputs: each belongs to another kind of model than this family compiles.
FOREIGN_UNET_SETTINGS = {
    "addition_embed_type": "SDXL-like models condition on text and time ids",
    "class_embed_type": "class-conditional UNets take labels",
    "num_class_embeds": "class-conditional UNets take labels",
    "time_cond_proj_dim": "guidance-distilled (LCM) UNets take an embedded guidance",
    "encoder_hid_dim_type": "image-prompt UNets take projected image embeddings",
}


def step_spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
    rows = bucket.batch * (2 if recipe.classifier_free_guidance else 1)
    width = int(source.setting("text_encoder", "hidden_size"))
    context = (rows, parts.clip_length(source, "text_encoder"), width)
    inputs = {"guidance_rescale": (1,), "context": context}
    return parts.step_spec(parts.latent_shape(source, bucket), inputs, scheduler_config(source))


def step_module(source: ModelSource, recipe: Recipe) -> nn.Module:
    from toolchain.models.modules import UNetStep

    unet = parts.make_network(source, "unet", "UNet2DConditionModel", recipe, "denoiser")
    return UNetStep(unet, recipe.classifier_free_guidance, recipe.component("denoiser").dtype)


def step_reference(source: ModelSource, recipe: Recipe) -> nn.Module:
    from toolchain.models.modules import UNetStep

    unet = parts.load_network(source, "unet", "UNet2DConditionModel")
    return UNetStep(unet, recipe.classifier_free_guidance, "float32")


def check(source: ModelSource, recipe: Recipe) -> None:
    """Refuses what the step graph does not cover, from the configs alone."""
    parts.check_classes(source, CLASSES)
    latent_channels = source.setting("vae", "latent_channels")
    vae.check(source, vae.scaled)
    parts.check_clip(source, "text_encoder", "unet")
    refuse_settings(source, FOREIGN_UNET_SETTINGS, "sd")
    parts.check_channels(source, "unet", latent_channels)
    check_output(source, latent_channels)
    width = source.setting("text_encoder", "hidden_size")
    parts.check_equal(source, "unet", "cross_attention_dim", width, "the text encoder's hidden_size")
    safety.check(source, recipe)


def check_output(source: ModelSource, latent_channels: int) -> None:
    """ModelError for a UNet that gives other channels than it takes, such as a variance beside the noise."""
    got = source.config("unet").get("out_channels", 4)
    if got != latent_channels:
        where = source.path / "unet" / "config.json"
        expected = f"out_channels = {latent_channels}"
        raise ModelError("the UNet gives other channels than it takes", where=where, expected=expected, got=got)


def refuse_settings(source: ModelSource, foreign: dict[str, str], family: str) -> None:
    """ModelError for a UNet with a setting that belongs to another kind of model."""
    for setting, reason in foreign.items():
        value = source.config("unet").get(setting)
        if value is not None:
            where = source.path / "unet" / "config.json"
            raise ModelError(
                f"family {family} does not cover this UNet: {reason}", where=where, got=f"{setting} = {value!r}"
            )


def scheduler_config(source: ModelSource) -> dict[str, Any]:
    """The scheduler's config as StableDiffusionPipeline's constructor leaves it: it sets steps_offset to 1 and turns
    clip_sample off, whatever the file says. What the file is silent about it changes for the model's own class alone:
    another class made from this config takes its own default."""
    config = source.config("scheduler")
    forced = {"steps_offset": 1, "clip_sample": False}
    silent = sorted(forced.keys() - config.keys())
    return config | forced | ({DEFAULTED: silent} if silent else {})


def settings(source: ModelSource) -> ModelSettings:
    factor = parts.vae_factor(source)
    return ModelSettings(
        scheduler=scheduler_config(source),
        vae_factor=factor,
        multiple=factor,
        token_pixels=factor,
        max_clip_skip=parts.clip_layers(source, "text_encoder"),
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
    components=(
        parts.clip_text_encoder(
            "text_encoder", cls="CLIPTextModel", layer=1, normed=True, context="context", masks=True
        ),
        Component("denoiser", "unet", "unet.", True, True, step_spec, step_module, step_reference),
        vae.vae_decoder(vae.scaled),
        vae.vae_encoder(vae.scaled),
    ),
    check=check,
    settings=settings,
    checker=safety.safety_checker(),
)
