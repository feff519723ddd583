"""FLUX.1 dev and schnell: CLIP's pooled output and T5's hidden state, a transformer over packed latents, an 8x VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.errors import ModelError
from toolchain.models import parts, vae
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe
from toolchain.settings import ModelSettings
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch import nn

CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "transformer": ("FluxTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": parts.CLIP_TOKENIZERS,
    "tokenizer_2": parts.T5_TOKENIZERS,
}
PATCH = 2
"""Latents per token of the network, along each side."""
AXES = (16, 56, 56)
HEAD_SIZE = 128
"""What diffusers takes where the transformer's config is silent."""
T5_TOKENS = 512
"""The pipeline's default and the most that it allows."""


def step_spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
    latents = parts.latent_shape(source, bucket)
    batch, channels, height, width = latents
    rows = batch * (2 if recipe.classifier_free_guidance else 1)
    tokens = recipe.component("text_encoder_2").tokens or T5_TOKENS
    inputs: dict[str, tuple[int, ...]] = {
        "context": (rows, tokens, int(source.setting("text_encoder_2", "d_model"))),
        "pooled": (rows, int(source.setting("text_encoder", "hidden_size"))),
    }
    if recipe.classifier_free_guidance:
        inputs["true_cfg"] = (1,)
    # The pipeline keeps its latents packed, and schedulers draw their noise in the shape of what they are given.
    packed = (batch, height // PATCH * (width // PATCH), channels * PATCH * PATCH)
    return parts.step_spec(latents, inputs, source.config("scheduler"), packed)


def step_module(source: ModelSource, recipe: Recipe) -> nn.Module:
    transformer = parts.make_network(source, "transformer", "FluxTransformer2DModel", recipe, "denoiser")
    return _wrap(transformer, source, recipe, recipe.component("denoiser").dtype)


def step_reference(source: ModelSource, recipe: Recipe) -> nn.Module:
    transformer = parts.load_network(source, "transformer", "FluxTransformer2DModel")
    return _wrap(transformer, source, recipe, "float32")


def _wrap(transformer: nn.Module, source: ModelSource, recipe: Recipe, dtype: str) -> nn.Module:
    from toolchain.models.flux_step import FluxStep

    return FluxStep(transformer, recipe.classifier_free_guidance, embeds_guidance(source), dtype)


def embeds_guidance(source: ModelSource) -> bool:
    """Whether the network was distilled with its guidance as an input: dev, not schnell."""
    return bool(source.config("transformer").get("guidance_embeds"))


def check(source: ModelSource, recipe: Recipe) -> None:
    """Refuses what the step graph does not cover, from the configs alone."""
    parts.check_classes(source, CLASSES)
    latent_channels = source.setting("vae", "latent_channels")
    vae.check(source, vae.shifted)
    parts.check_clip(source, "text_encoder", "transformer")
    parts.check_t5(source, "text_encoder_2", "transformer", recipe, T5_TOKENS)
    parts.check_channels(source, "transformer", latent_channels * PATCH * PATCH)
    width = source.setting("text_encoder_2", "d_model")
    parts.check_equal(source, "transformer", "joint_attention_dim", width, "text_encoder_2's d_model")
    pooled = source.setting("text_encoder", "hidden_size")
    parts.check_equal(source, "transformer", "pooled_projection_dim", pooled, "text_encoder's hidden_size")
    check_transformer(source)


def check_transformer(source: ModelSource) -> None:
    """ModelError for a transformer whose positions do not fill its heads, or that gives other tokens than it takes."""
    config = source.config("transformer")
    where = source.path / "transformer" / "config.json"
    size = config.get("attention_head_dim", HEAD_SIZE)
    axes = config.get("axes_dims_rope", AXES)
    if not isinstance(axes, list | tuple) or len(axes) != 3 or not all(type(n) is int and n % 2 == 0 for n in axes):
        expected = "three even numbers: text, row and column"
        raise ModelError("axes_dims_rope is no list of sizes", where=where, expected=expected, got=repr(axes))
    if sum(axes) != size:
        raise ModelError(
            "the positions of the transformer do not fill its heads",
            where=where,
            expected=f"axes_dims_rope that sum to attention_head_dim = {size}",
            got=f"{axes}, which sum to {sum(axes)}",
        )
    for key, same in (("out_channels", source.setting("transformer", "in_channels")), ("patch_size", 1)):
        if config.get(key) not in (None, same):
            raise ModelError(
                "the transformer gives other tokens than it takes",
                where=where,
                expected=f"{key} = {same}, or none",
                got=config[key],
            )


def settings(source: ModelSource) -> ModelSettings:
    factor = parts.vae_factor(source)
    return ModelSettings(
        scheduler=source.config("scheduler"),
        vae_factor=factor,
        multiple=factor * PATCH,
        token_pixels=factor * PATCH,
        linear_sigmas=True,
        embedded_guidance=embeds_guidance(source),
        encode_once=True,
        early_start=True,
    )


FLUX = Family(
    name="flux",
    # Fill, Control and Kontext have pipelines of their own: their networks are given pictures beside the latents. A
    # Kontext network in a folder of this pipeline cannot be told from dev's, and draws from text here as in diffusers.
    pipeline="FluxPipeline",
    others=(
        "FluxImg2ImgPipeline",
        "FluxInpaintPipeline",
        "FluxControlNetPipeline",
        "FluxControlNetImg2ImgPipeline",
        "FluxControlNetInpaintPipeline",
    ),
    components=(
        parts.clip_text_encoder("text_encoder", cls="CLIPTextModel", layer=None, pooled="pooled"),
        parts.t5_text_encoder("text_encoder_2", context="context", tokens=T5_TOKENS, optional=False),
        Component("denoiser", "transformer", "transformer.", True, True, step_spec, step_module, step_reference),
        vae.vae_decoder(vae.shifted),
        vae.vae_encoder(vae.shifted),
    ),
    check=check,
    settings=settings,
)
