"""Stable Diffusion XL: two CLIP text encoders, a UNet that also takes a pooled prompt and sizes, an 8x VAE."""

from __future__ import annotations

import json
import logging
from functools import cache

from toolchain.errors import ModelError, RecipeError
from toolchain.models import checks, vae
from toolchain.models.component import Family
from toolchain.models.sdxl_components import COMPONENTS, ENCODERS, PENULTIMATE, TIME_IDS
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import clip_layers
from toolchain.recipe import Recipe
from toolchain.settings import ModelSettings

log = logging.getLogger("toolchain")

CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": checks.CLIP_TOKENIZERS,
    "tokenizer_2": checks.CLIP_TOKENIZERS,
}
FOREIGN_SETTINGS = {key: why for key, why in checks.FOREIGN_UNET_SETTINGS.items() if key != "addition_embed_type"}


def check(source: ModelSource, recipe: Recipe) -> None:
    """Checks the configs. ModelError for what the graphs do not cover, RecipeError where the recipe does not fit."""
    _refuse_refiner(source)
    checks.check_classes(source, CLASSES)
    latent_channels = source.setting("vae", "latent_channels")
    checks.check_vae(source, vae.normalised)
    for folder in ENCODERS:
        checks.check_clip(source, folder, "unet")
        checks.check_sizes(source, {(folder, "num_hidden_layers"): clip_layers(source, folder)})
    checks.check_lengths(source, ENCODERS)
    _check_unet(source, latent_channels)
    _check_vae(source, recipe)
    if source.index.get("add_watermarker"):
        _warn_of_watermark(source.name)


@cache
def _warn_of_watermark(model: str) -> None:
    """Once for a model: a command may check it more than once."""
    log.warning("%s asks for an invisible watermark (add_watermarker), which pictures drawn here do not bear", model)


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
    checks.refuse_unet_settings(source, FOREIGN_SETTINGS, "sdxl")
    checks.check_channels(source, "unet", latent_channels)
    checks.check_unet_output(source, latent_channels)
    pooled = source.setting("text_encoder_2", "projection_dim")
    embedded = source.setting("unet", "addition_time_embed_dim")
    checks.check_sizes(
        source, {("text_encoder_2", "projection_dim"): pooled, ("unet", "addition_time_embed_dim"): embedded}
    )
    context = sum(source.setting(folder, "hidden_size") for folder in ENCODERS)
    checks.check_equal(source, "unet", "cross_attention_dim", context, "both text encoders' hidden_size together")
    checks.check_equal(
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
        half = recipe.component(part)
        if part not in recipe.without and half.dtype == "float16" and not half.keep_float32:
            raise RecipeError(
                "the model's VAE overflows in float16: its pictures would be black",
                where=f"{recipe.name}: components.{part}.dtype",
                expected=f'"float32" or "bfloat16", because of force_upcast = true in {where}',
                got=half.dtype,
                hint="a VAE that was trained for float16 says force_upcast = false",
            )


def settings(source: ModelSource) -> ModelSettings:
    """The settings of the model that the runtime needs."""
    factor = vae.vae_factor(source)
    layers = min(clip_layers(source, folder) for folder in ENCODERS)
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
    components=COMPONENTS,
    check=check,
    settings=settings,
)
