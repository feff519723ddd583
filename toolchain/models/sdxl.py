"""Stable Diffusion XL: two CLIP text encoders, a UNet that also takes a pooled prompt and sizes, an 8x VAE."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from toolchain.errors import ModelError, RecipeError
from toolchain.models import parts, vae
from toolchain.models.component import Component, Family
from toolchain.models.sd import FOREIGN_UNET_SETTINGS, check_output, refuse_settings
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe
from toolchain.settings import ModelSettings
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch import nn

ENCODERS = ("text_encoder", "text_encoder_2")
CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": parts.CLIP_TOKENIZERS,
    "tokenizer_2": parts.CLIP_TOKENIZERS,
}
FOREIGN_SETTINGS = {key: why for key, why in FOREIGN_UNET_SETTINGS.items() if key != "addition_embed_type"}
# Original height and width, top and left of the crop, target height and width.
TIME_IDS = 6
# The hidden state that both text encoders give, counted from the last.
PENULTIMATE = 2


def step_spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
    rows = bucket.batch * (2 if recipe.classifier_free_guidance else 1)
    length = parts.clip_length(source, "text_encoder")
    widths = [int(source.setting(folder, "hidden_size")) for folder in ENCODERS]
    inputs = {
        "guidance_rescale": (1,),
        "context": (rows, length, widths[0]),
        "context_2": (rows, length, widths[1]),
        "pooled": (rows, int(source.setting("text_encoder_2", "projection_dim"))),
        "time_ids": (rows, TIME_IDS),
    }
    return parts.step_spec(parts.latent_shape(source, bucket), inputs, source.config("scheduler"))


def step_module(source: ModelSource, recipe: Recipe) -> nn.Module:
    from toolchain.models.sdxl_step import SDXLStep

    unet = parts.make_network(source, "unet", "UNet2DConditionModel", recipe, "denoiser")
    return SDXLStep(unet, recipe.classifier_free_guidance, recipe.component("denoiser").dtype)


def step_reference(source: ModelSource, recipe: Recipe) -> nn.Module:
    from toolchain.models.sdxl_step import SDXLStep

    unet = parts.load_network(source, "unet", "UNet2DConditionModel")
    return SDXLStep(unet, recipe.classifier_free_guidance, "float32")


def check(source: ModelSource, recipe: Recipe) -> None:
    """Refuses what the graphs do not cover, from the configs alone."""
    _refuse_refiner(source)
    parts.check_classes(source, CLASSES)
    latent_channels = source.setting("vae", "latent_channels")
    vae.check(source, vae.normalised)
    for folder in ENCODERS:
        parts.check_clip(source, folder, "unet")
        parts.check_sizes(source, {(folder, "num_hidden_layers"): parts.clip_layers(source, folder)})
    parts.check_lengths(source, ENCODERS)
    _check_unet(source, latent_channels)
    _check_vae(source, recipe)


def _refuse_refiner(source: ModelSource) -> None:
    if source.index.get("text_encoder") in (None, [None, None]) and source.index.get("text_encoder_2"):
        raise ModelError(
            "the model has no first text encoder, as SDXL's refiner has none, which is not supported",
            where=source.path / "model_index.json",
            expected='"text_encoder": ["transformers", "CLIPTextModel"]',
            got=json.dumps(source.index.get("text_encoder")),
            hint="use the base model; it draws pictures without the refiner",
        )


def _check_unet(source: ModelSource, latent_channels: int) -> None:
    config = source.config("unet")
    if config.get("addition_embed_type") != "text_time":
        raise ModelError(
            "family sdxl does not cover this UNet: it does not condition on the pooled prompt and time ids",
            where=source.path / "unet" / "config.json",
            expected='addition_embed_type = "text_time"',
            got=repr(config.get("addition_embed_type")),
        )
    refuse_settings(source, FOREIGN_SETTINGS, "sdxl")
    parts.check_channels(source, "unet", latent_channels)
    check_output(source, latent_channels)
    pooled = source.setting("text_encoder_2", "projection_dim")
    embedded = source.setting("unet", "addition_time_embed_dim")
    parts.check_sizes(
        source, {("text_encoder_2", "projection_dim"): pooled, ("unet", "addition_time_embed_dim"): embedded}
    )
    context = sum(source.setting(folder, "hidden_size") for folder in ENCODERS)
    parts.check_equal(source, "unet", "cross_attention_dim", context, "both text encoders' hidden_size together")
    parts.check_equal(
        source,
        "unet",
        "projection_class_embeddings_input_dim",
        pooled + TIME_IDS * embedded,
        f"text_encoder_2's projection_dim and {TIME_IDS} times addition_time_embed_dim",
    )


def _check_vae(source: ModelSource, recipe: Recipe) -> None:
    config, where = source.config("vae"), source.path / "vae" / "config.json"
    if not config.get("force_upcast", True):
        return
    for part in ("vae_decoder", "vae_encoder"):
        own = recipe.component(part)
        if part not in recipe.without and own.dtype == "float16" and not own.keep_float32:
            raise RecipeError(
                "the model's VAE overflows in float16: its pictures would be black",
                where=f"{recipe.name}: components.{part}.dtype",
                expected=f'"float32" or "bfloat16", because of force_upcast = true in {where}',
                got=own.dtype,
                hint="a VAE that was trained for float16 says force_upcast = false",
            )


def settings(source: ModelSource) -> ModelSettings:
    factor = parts.vae_factor(source)
    layers = min(parts.clip_layers(source, folder) for folder in ENCODERS)
    return ModelSettings(
        scheduler=source.config("scheduler"),
        vae_factor=factor,
        multiple=factor,
        token_pixels=factor,
        zero_negative=bool(source.index.get("force_zeros_for_empty_prompt", True)),
        max_clip_skip=layers - (PENULTIMATE - 1),
    )


SDXL = Family(
    name="sdxl",
    pipeline="StableDiffusionXLPipeline",
    others=(
        "StableDiffusionXLImg2ImgPipeline",
        "StableDiffusionXLInpaintPipeline",
        "StableDiffusionXLControlNetPipeline",
        "StableDiffusionXLControlNetImg2ImgPipeline",
        "StableDiffusionXLControlNetInpaintPipeline",
        "StableDiffusionXLControlNetUnionPipeline",
        "StableDiffusionXLControlNetUnionImg2ImgPipeline",
        "StableDiffusionXLControlNetUnionInpaintPipeline",
        "StableDiffusionXLAdapterPipeline",
        "StableDiffusionXLPAGPipeline",
        "StableDiffusionXLPAGImg2ImgPipeline",
        "StableDiffusionXLPAGInpaintPipeline",
        "StableDiffusionXLControlNetPAGPipeline",
        "StableDiffusionXLControlNetPAGImg2ImgPipeline",
    ),
    components=(
        parts.clip_text_encoder("text_encoder", cls="CLIPTextModel", layer=PENULTIMATE, context="context"),
        parts.clip_text_encoder(
            "text_encoder_2",
            cls="CLIPTextModelWithProjection",
            layer=PENULTIMATE,
            context="context_2",
            pooled="pooled",
        ),
        Component("denoiser", "unet", "unet.", True, True, step_spec, step_module, step_reference),
        vae.vae_decoder(vae.normalised),
        vae.vae_encoder(vae.normalised),
    ),
    check=check,
    settings=settings,
)
