"""Stable Diffusion 3 and 3.5: two CLIP text encoders and perhaps T5, a transformer over joint attention, an 8x VAE."""

from __future__ import annotations

import json

from toolchain.errors import ModelError, RecipeError
from toolchain.models import checks, vae
from toolchain.models.component import Family
from toolchain.models.sd3_components import CLIPS, COMPONENTS, PENULTIMATE, T5
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import clip_layers
from toolchain.recipe import Recipe
from toolchain.settings import ModelSettings

CLASSES = {
    "text_encoder": ("CLIPTextModelWithProjection",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": checks.CLIP_TOKENIZERS,
    "tokenizer_2": checks.CLIP_TOKENIZERS,
}
T5_CLASSES = {T5: ("T5EncoderModel",), "tokenizer_3": checks.T5_TOKENIZERS}
T5_MOST_TOKENS = 512
"""The most that the pipeline allows."""
# What diffusers takes where the transformer's config is silent.
PATCH_SIZE = 2
POSITIONS = 96
HEADS = 18
HEAD_SIZE = 64


def check(source: ModelSource, recipe: Recipe) -> None:
    """Checks the configs. ModelError for what the graphs do not cover, RecipeError where the recipe does not fit."""
    _check_t5_is_there(source, recipe)
    checks.check_classes(source, CLASSES if T5 in recipe.without else CLASSES | T5_CLASSES)
    latent_channels = source.setting("vae", "latent_channels")
    checks.check_vae(source, vae.shifted)
    for folder in CLIPS:
        checks.check_clip(source, folder, "transformer")
        projection = source.setting(folder, "projection_dim")
        checks.check_sizes(
            source,
            {(folder, "projection_dim"): projection, (folder, "num_hidden_layers"): clip_layers(source, folder)},
        )
    checks.check_lengths(source, CLIPS)
    if T5 not in recipe.without:
        checks.check_t5(source, T5, "transformer", recipe, T5_MOST_TOKENS)
    _check_transformer(source, recipe, latent_channels)
    _check_widths(source, recipe)


def _check_t5_is_there(source: ModelSource, recipe: Recipe) -> None:
    """RecipeError for a model without the third text encoder where the recipe does not leave it out."""
    entry = source.index.get(T5)
    if entry in (None, [None, None]) and T5 not in recipe.without:
        raise RecipeError(
            "the model has no third text encoder",
            where=f"{recipe.name}: without",
            expected=f'without = ["{T5}"], because of {source.path / "model_index.json"}',
            got=f'"{T5}": {json.dumps(entry)}',
            hint="the model draws pictures without T5, and follows long prompts and spelling less",
        )


def _check_transformer(source: ModelSource, recipe: Recipe, latent_channels: int) -> None:
    config, where = source.config("transformer"), source.path / "transformer" / "config.json"
    sizes = {
        "patch_size": _patch_size(source),
        "pos_embed_max_size": config.get("pos_embed_max_size", POSITIONS),
        "num_attention_heads": config.get("num_attention_heads", HEADS),
        "attention_head_dim": config.get("attention_head_dim", HEAD_SIZE),
    }
    checks.check_sizes(source, {("transformer", key): value for key, value in sizes.items()})
    checks.check_channels(source, "transformer", latent_channels)
    if config.get("out_channels") not in (None, latent_channels):
        raise ModelError(
            "the transformer's output has other channels than its input",
            where=where,
            expected=f"out_channels = {latent_channels}, or none",
            got=config["out_channels"],
        )
    inner = sizes["num_attention_heads"] * sizes["attention_head_dim"]
    checks.check_equal(
        source, "transformer", "caption_projection_dim", inner, "num_attention_heads times attention_head_dim"
    )
    pixels = sizes["pos_embed_max_size"] * sizes["patch_size"] * vae.vae_factor(source)
    checks.check_positions(recipe, pixels, f"pos_embed_max_size = {sizes['pos_embed_max_size']} in {where}")


def _check_widths(source: ModelSource, recipe: Recipe) -> None:
    joint = source.setting("transformer", "joint_attention_dim")
    checks.check_sizes(source, {("transformer", "joint_attention_dim"): joint})
    pooled = sum(source.setting(folder, "projection_dim") for folder in CLIPS)
    checks.check_equal(
        source, "transformer", "pooled_projection_dim", pooled, "both CLIP text encoders' projection_dim together"
    )
    if T5 not in recipe.without:
        checks.check_equal(
            source, "transformer", "joint_attention_dim", source.setting(T5, "d_model"), f"{T5}'s d_model"
        )
    clip = sum(source.setting(folder, "hidden_size") for folder in CLIPS)
    if clip > joint:
        raise ModelError(
            "the CLIP text encoders are wider than the transformer's context",
            where=source.path / "transformer" / "config.json",
            expected=f"joint_attention_dim of {clip} at least, both text encoders' hidden_size together",
            got=joint,
            hint="the folder mixes components of two models; download it again",
        )


def _patch_size(source: ModelSource) -> int:
    """Latents per token of the network, along each side."""
    size: int = source.config("transformer").get("patch_size", PATCH_SIZE)
    return size


def settings(source: ModelSource) -> ModelSettings:
    """The settings of the model that the runtime needs."""
    factor = vae.vae_factor(source)
    token = factor * _patch_size(source)
    return ModelSettings(
        scheduler=source.config("scheduler"),
        vae_factor=factor,
        multiple=token,
        token_pixels=token,
        early_start=True,
        max_clip_skip=min(clip_layers(source, folder) for folder in CLIPS) - (PENULTIMATE - 1),
    )


SD3 = Family(
    name="sd3",
    pipeline="StableDiffusion3Pipeline",
    others=(
        "StableDiffusion3Img2ImgPipeline",
        "StableDiffusion3InpaintPipeline",
        "StableDiffusion3ControlNetPipeline",
        "StableDiffusion3ControlNetInpaintingPipeline",
        "StableDiffusion3PAGPipeline",
        "StableDiffusion3PAGImg2ImgPipeline",
    ),
    components=COMPONENTS,
    check=check,
    settings=settings,
    inversion=False,
)
