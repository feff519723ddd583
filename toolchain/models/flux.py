"""FLUX.1 dev and schnell: CLIP's pooled output and T5's hidden state, a transformer over packed latents, an 8x VAE."""

from __future__ import annotations

from toolchain.errors import ModelError
from toolchain.models import checks, vae
from toolchain.models.component import Family
from toolchain.models.flux_components import COMPONENTS, PATCH, T5_TOKENS, embeds_guidance
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe
from toolchain.settings import ModelSettings

CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("T5EncoderModel",),
    "transformer": ("FluxTransformer2DModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": checks.CLIP_TOKENIZERS,
    "tokenizer_2": checks.T5_TOKENIZERS,
}
AXES = (16, 56, 56)
HEAD_SIZE = 128
"""What diffusers takes where the transformer's config is silent."""


def check(source: ModelSource, recipe: Recipe) -> None:
    """Checks the configs. ModelError for what the graphs do not cover, RecipeError where the recipe does not fit."""
    checks.check_classes(source, CLASSES)
    latent_channels = source.setting("vae", "latent_channels")
    checks.check_vae(source, vae.shifted)
    checks.check_clip(source, "text_encoder", "transformer")
    checks.check_t5(source, "text_encoder_2", "transformer", recipe, T5_TOKENS)
    checks.check_channels(source, "transformer", latent_channels * PATCH * PATCH)
    width = source.setting("text_encoder_2", "d_model")
    checks.check_equal(source, "transformer", "joint_attention_dim", width, "text_encoder_2's d_model")
    pooled = source.setting("text_encoder", "hidden_size")
    checks.check_equal(source, "transformer", "pooled_projection_dim", pooled, "text_encoder's hidden_size")
    check_transformer(source)


def check_transformer(source: ModelSource) -> None:
    """ModelError where rotary axes do not add up to the head size, or the output has other tokens than the input."""
    config = source.config("transformer")
    where = source.path / "transformer" / "config.json"
    size = config.get("attention_head_dim", HEAD_SIZE)
    axes = config.get("axes_dims_rope", AXES)
    if not isinstance(axes, list | tuple) or len(axes) != 3 or not all(type(n) is int and n % 2 == 0 for n in axes):
        expected = "three even numbers: text, row and column"
        raise ModelError("axes_dims_rope is not a list of sizes", where=where, expected=expected, got=repr(axes))
    if sum(axes) != size:
        raise ModelError(
            "the transformer's rotary axes do not add up to its head size",
            where=where,
            expected=f"axes_dims_rope that sum to attention_head_dim = {size}",
            got=f"{axes}, which sum to {sum(axes)}",
        )
    for key, same in (("out_channels", source.setting("transformer", "in_channels")), ("patch_size", 1)):
        if config.get(key) not in (None, same):
            raise ModelError(
                "the transformer's output has other tokens than its input",
                where=where,
                expected=f"{key} = {same}, or none",
                got=config[key],
            )


def settings(source: ModelSource) -> ModelSettings:
    """The settings of the model that the runtime needs."""
    factor = vae.vae_factor(source)
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
    components=COMPONENTS,
    check=check,
    settings=settings,
)
