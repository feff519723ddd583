"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross attention, an 8x VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, ComponentRecipe
from toolchain.sampler.table import MAX_EVALUATIONS, MAX_STATES, ROW
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

CLASSES = {
    "text_encoder": ("CLIPTextModel",),
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
# Settings of a UNet that change its inputs: each belongs to another kind of model than this family compiles.
FOREIGN_UNET_SETTINGS = {
    "addition_embed_type": "SDXL-like models condition on text and time ids",
    "class_embed_type": "class-conditional UNets take labels",
    "time_cond_proj_dim": "guidance-distilled (LCM) UNets take an embedded guidance",
    "encoder_hid_dim_type": "image-prompt UNets take projected image embeddings",
}


def vae_factor(source: ModelSource) -> int:
    """Pixels per latent along each side."""
    return int(2 ** (len(source.setting("vae", "block_out_channels")) - 1))


def latent_shape(source: ModelSource, bucket: Bucket) -> tuple[int, int, int, int]:
    factor = vae_factor(source)
    return bucket.batch, int(source.setting("vae", "latent_channels")), bucket.height // factor, bucket.width // factor


def text_length(source: ModelSource) -> int:
    return int(source.config("text_encoder").get("max_position_embeddings", 77))


def text_spec(source: ModelSource, bucket: Bucket, guided: bool) -> GraphSpec:
    length, width = text_length(source), int(source.setting("text_encoder", "hidden_size"))
    return GraphSpec(
        (TensorSpec("ids", "int64", (1, length)),),
        (TensorSpec("context", "float32", (1, length, width)),),
    )


def step_spec(source: ModelSource, bucket: Bucket, guided: bool) -> GraphSpec:
    latents = latent_shape(source, bucket)
    width = int(source.setting("text_encoder", "hidden_size"))
    state = TensorSpec("state", "float32", (MAX_STATES, *latents))
    step = TensorSpec("step", "int64", (1,))
    return GraphSpec(
        (
            state,
            step,
            TensorSpec("timesteps", "float32", (MAX_EVALUATIONS,)),
            TensorSpec("table", "float32", (MAX_EVALUATIONS, ROW)),
            TensorSpec("noise", "float32", latents),
            TensorSpec("guidance", "float32", (1,)),
            TensorSpec("context", "float32", (bucket.batch * (2 if guided else 1), text_length(source), width)),
        ),
        (TensorSpec("next_state", "float32", state.shape), TensorSpec("next_step", "int64", (1,))),
    )


def decoder_spec(source: ModelSource, bucket: Bucket, guided: bool) -> GraphSpec:
    pixels = (bucket.batch, bucket.height, bucket.width, 3)
    return GraphSpec(
        (TensorSpec("latents", "float32", latent_shape(source, bucket)),),
        (TensorSpec("pixels", "uint8", pixels), TensorSpec("image", "float32", pixels)),
    )


def text_module(source: ModelSource, recipe: ComponentRecipe, guided: bool) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    from toolchain.models import modules

    config = CLIPTextConfig(**source.config("text_encoder"))
    text = modules.construct(lambda: CLIPTextModel(config), recipe.dtype, recipe.keep_float32, "text_encoder")
    return modules.ClipTextEncoder(text)


def text_reference(source: ModelSource, guided: bool) -> nn.Module:
    import torch
    from transformers import CLIPTextModel

    from toolchain.models import modules

    folder = source.path / "text_encoder"
    return modules.ClipTextEncoder(
        CLIPTextModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True, variant=source.variant).eval()
    )


def step_module(source: ModelSource, recipe: ComponentRecipe, guided: bool) -> nn.Module:
    from diffusers import UNet2DConditionModel

    from toolchain.models import modules

    config = source.config("unet")
    unet = modules.construct(
        lambda: UNet2DConditionModel.from_config(config), recipe.dtype, recipe.keep_float32, "denoiser"
    )
    return modules.UNetStep(unet, guided, recipe.dtype)


def step_reference(source: ModelSource, guided: bool) -> nn.Module:
    import torch
    from diffusers import UNet2DConditionModel

    from toolchain.models import modules

    unet = UNet2DConditionModel.from_pretrained(
        source.path / "unet", torch_dtype=torch.float32, use_safetensors=True, variant=source.variant
    )
    return modules.UNetStep(unet.eval(), guided, "float32")


def decoder_module(source: ModelSource, recipe: ComponentRecipe, guided: bool) -> nn.Module:
    from diffusers import AutoencoderKL

    from toolchain.models import modules

    config = source.config("vae")
    vae = modules.construct(lambda: AutoencoderKL.from_config(config), recipe.dtype, recipe.keep_float32, "vae_decoder")
    return modules.VaeDecoder(vae, float(config.get("scaling_factor", 0.18215)), 0.0, recipe.dtype)


def decoder_reference(source: ModelSource, guided: bool) -> nn.Module:
    import torch
    from diffusers import AutoencoderKL

    from toolchain.models import modules

    vae = AutoencoderKL.from_pretrained(
        source.path / "vae", torch_dtype=torch.float32, use_safetensors=True, variant=source.variant
    )
    scaling_factor = float(source.config("vae").get("scaling_factor", 0.18215))
    return modules.VaeDecoder(vae.eval(), scaling_factor, 0.0, "float32")


def check(source: ModelSource) -> None:
    """Refuses what the step graph does not cover, from the configs alone."""
    for folder, classes in CLASSES.items():
        if source.class_of(folder) not in classes:
            raise ModelError(
                f"the {folder} is of an unsupported class",
                where=source.path / "model_index.json",
                expected=" or ".join(classes),
                got=source.class_of(folder),
            )
    unet = source.config("unet")
    latent_channels = source.setting("vae", "latent_channels")
    in_channels = source.setting("unet", "in_channels")
    cross_attention, width = (
        source.setting("unet", "cross_attention_dim"),
        source.setting("text_encoder", "hidden_size"),
    )
    where = source.path / "unet" / "config.json"
    for setting, reason in FOREIGN_UNET_SETTINGS.items():
        if unet.get(setting) is not None:
            raise ModelError(
                f"family sd does not cover this UNet: {reason}", where=where, got=f"{setting} = {unet[setting]!r}"
            )
    if in_channels != latent_channels:
        raise ModelError(
            "the UNet takes other channels than the VAE's latents: inpainting and instruction models are not supported",
            where=where,
            expected=f"in_channels = {latent_channels}",
            got=in_channels,
        )
    if cross_attention != width:
        raise ModelError(
            "the text encoder does not fit the UNet",
            where=where,
            expected=f"cross_attention_dim = {width}, the text encoder's hidden_size",
            got=cross_attention,
            hint="the folder mixes components of two models; download it again",
        )


def settings(source: ModelSource) -> dict[str, Any]:
    return {"vae_factor": vae_factor(source), "latent_channels": int(source.setting("vae", "latent_channels"))}


SD = Family(
    name="sd",
    pipelines=("StableDiffusionPipeline",),
    components=(
        Component("text_encoder", "text_encoder", "text.", False, False, text_spec, text_module, text_reference),
        Component("denoiser", "unet", "unet.", True, True, step_spec, step_module, step_reference),
        Component("vae_decoder", "vae", "vae.", True, True, decoder_spec, decoder_module, decoder_reference),
    ),
    check=check,
    settings=settings,
)
