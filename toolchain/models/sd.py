"""Stable Diffusion 1.x and 2.x: one CLIP text encoder, a UNet with cross attention, an 8x VAE."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError
from toolchain.models.component import Component, Family
from toolchain.models.source import ModelSource
from toolchain.models.tokenizers import require_vocabulary
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
# Named, because a config can name one too: a kernel that transformers would fetch from the hub and run.
ATTENTION = "sdpa"
# Settings of a UNet that change its inputs: each belongs to another kind of model than this family compiles.
FOREIGN_UNET_SETTINGS = {
    "addition_embed_type": "SDXL-like models condition on text and time ids",
    "class_embed_type": "class-conditional UNets take labels",
    "num_class_embeds": "class-conditional UNets take labels",
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

    config = CLIPTextConfig(**{**source.config("text_encoder"), "attn_implementation": ATTENTION})
    text = modules.construct(lambda: CLIPTextModel(config), recipe.dtype, recipe.keep_float32, "text_encoder")
    return modules.ClipTextEncoder(text)


def text_reference(source: ModelSource, guided: bool) -> nn.Module:
    import torch
    from transformers import CLIPTextModel

    from toolchain.models import modules

    text = CLIPTextModel.from_pretrained(
        source.path / "text_encoder",
        dtype=torch.float32,
        use_safetensors=True,
        variant=source.variant("text_encoder"),
        attn_implementation=ATTENTION,
    )
    return modules.ClipTextEncoder(text.eval())


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
        source.path / "unet", dtype=torch.float32, use_safetensors=True, variant=source.variant("unet")
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
        source.path / "vae", dtype=torch.float32, use_safetensors=True, variant=source.variant("vae")
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
    source.class_of("scheduler")  # which one it is, is the sampler's business
    for folder in ("text_encoder", "unet", "vae"):
        _refuse_code(source, folder)
    _check_numbers(source)
    _check_tokenizer(source)
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


def _refuse_code(source: ModelSource, folder: str) -> None:
    """Settings, at any depth, that make transformers or diffusers fetch code from the hub and run it."""

    def visit(value: Any, path: str) -> None:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, inner in items:
            name = f"{path}.{key}" if path else str(key)
            # Older releases of transformers wrote true or false under a name like these; that names no code.
            names_code = key == "auto_map" or ("attn_implementation" in str(key) and not isinstance(inner, bool))
            if names_code and inner is not None:
                raise ModelError(
                    f"the {folder}'s config asks for code of its own, which is not run",
                    where=source.path / folder / "config.json",
                    got=f"{name} = {inner!r}",
                    hint="remove the setting from the config",
                )
            visit(inner, name)

    visit(source.config(folder), "")


def _check_numbers(source: ModelSource) -> None:
    """What planning computes shapes from."""
    found = {
        ("text_encoder", "hidden_size"): source.setting("text_encoder", "hidden_size"),
        ("text_encoder", "max_position_embeddings"): source.config("text_encoder").get("max_position_embeddings", 77),
        ("vae", "latent_channels"): source.setting("vae", "latent_channels"),
    }
    for (folder, key), value in found.items():
        if not isinstance(value, int) or value < 1:
            where = source.path / folder / "config.json"
            raise ModelError(f"{key} is no size", where=where, expected="a whole number above 0", got=repr(value))
    blocks = source.setting("vae", "block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        where = source.path / "vae" / "config.json"
        raise ModelError("block_out_channels is no list of sizes", where=where, got=repr(blocks))


def _check_tokenizer(source: ModelSource) -> None:
    """Graphs alone need no tokenizer; where there are weights, a bundle is to be built, and needs all of it."""
    folder = source.path / "tokenizer"
    if source.has_weights("unet"):
        require_vocabulary(folder)
    config = folder / "tokenizer_config.json"
    longest = source.config("tokenizer").get("model_max_length") if config.is_file() else None
    if longest is not None and longest != text_length(source):
        raise ModelError(
            "the tokenizer and the text encoder take prompts of different lengths",
            where=config,
            expected=f"model_max_length = {text_length(source)}, max_position_embeddings of text_encoder/config.json",
            got=longest,
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
