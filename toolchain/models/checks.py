"""Checks of a model's configs that families share: what no graph covers is refused before any work."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError, RecipeError
from toolchain.models import safety
from toolchain.models.refusals import refuse_code, refuse_quantized
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import CLIP_LENGTH, clip_length
from toolchain.models.tokenizers import GENERIC, require_right, require_vocabulary
from toolchain.recipe import Recipe

if TYPE_CHECKING:
    from toolchain.models.vae import Factors

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", GENERIC)
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", GENERIC)
# Where T5 exceeds float16 first: https://github.com/huggingface/transformers/issues/5651
T5_WIDE = "encoder.block.*.layer.1.DenseReluDense.wo"
# Settings of a UNet that change its inputs: each belongs to another kind of model than this family compiles.
FOREIGN_UNET_SETTINGS = {
    "addition_embed_type": "SDXL-like models condition on text and time ids",
    "class_embed_type": "class-conditional UNets take labels",
    "num_class_embeds": "class-conditional UNets take labels",
    "time_cond_proj_dim": "guidance-distilled (LCM) UNets take an embedded guidance",
    "encoder_hid_dim_type": "image-prompt UNets take projected image embeddings",
}


def check_classes(source: ModelSource, classes: Mapping[str, tuple[str, ...]]) -> None:
    """ModelError where model_index.json gives a component another class than the family's, or none."""
    for folder, allowed in classes.items():
        if source.class_of(folder) not in allowed:
            raise ModelError(
                f"the {folder} is of an unsupported class",
                where=source.path / "model_index.json",
                expected=" or ".join(allowed),
                got=source.class_of(folder),
            )
    source.class_of("scheduler")  # which one it is, is the sampler's business
    for folder in classes:
        if not folder.startswith("tokenizer"):
            refuse_code(source, folder)
            refuse_quantized(source, folder)


def check_sizes(source: ModelSource, sizes: Mapping[tuple[str, str], Any]) -> None:
    """Checks the config values from which shapes are computed, (folder, setting) -> value, and the VAE's blocks. Raises
    ModelError."""
    for (folder, key), value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            where = source.path / folder / "config.json"
            raise ModelError(f"{key} is not a size", where=where, expected="a whole number above 0", got=repr(value))
    blocks = source.setting("vae", "block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        where = source.path / "vae" / "config.json"
        raise ModelError("block_out_channels is not a list of sizes", where=where, got=repr(blocks))


def check_clip(source: ModelSource, folder: str, network: str) -> None:
    """Sizes and tokenizer of a CLIP text encoder. ModelError.

    Graphs alone need no tokenizer; where `network` has weights, a bundle is to be built, and needs all of it.
    """
    length = source.config(folder).get("max_position_embeddings", CLIP_LENGTH)
    check_sizes(
        source,
        {(folder, "hidden_size"): source.setting(folder, "hidden_size"), (folder, "max_position_embeddings"): length},
    )
    tokenizer = folder.replace("text_encoder", "tokenizer")
    if source.has_weights(network):
        require_vocabulary(source.path / tokenizer, t5=False, generic=source.class_of(tokenizer) == GENERIC)
    config = source.path / tokenizer / "tokenizer_config.json"
    settings = source.config(tokenizer) if config.is_file() else {}
    require_right(source.path / tokenizer, settings)
    longest = settings.get("model_max_length")
    if longest is not None and longest != length:
        raise ModelError(
            "the tokenizer and the text encoder take prompts of different lengths",
            where=config,
            expected=f"model_max_length = {length}, max_position_embeddings of {folder}/config.json",
            got=longest,
            hint="the folder mixes components of two models; download it again",
        )


def check_lengths(source: ModelSource, folders: tuple[str, str]) -> None:
    """ModelError unless both CLIP text encoders take as many tokens: their contexts are joined token by token."""
    first, second = (clip_length(source, folder) for folder in folders)
    if first != second:
        raise ModelError(
            "the text encoders take prompts of different lengths",
            where=source.path / folders[1] / "config.json",
            expected=f"max_position_embeddings = {first}, that of {folders[0]}/config.json",
            got=second,
            hint="the folder mixes components of two models; download it again",
        )


def check_t5(source: ModelSource, folder: str, network: str, recipe: Recipe, most_tokens: int) -> None:
    """Sizes and tokenizer of a T5 encoder, as `check_clip`: ModelError.

    RecipeError for prompts of more than `most_tokens`, and for a precision in which it would overflow.
    """
    layers = source.config(folder).get("num_layers", 6)
    check_sizes(source, {(folder, "d_model"): source.setting(folder, "d_model"), (folder, "num_layers"): layers})
    if source.has_weights(network):
        tokenizer = folder.replace("text_encoder", "tokenizer")
        require_vocabulary(source.path / tokenizer, t5=True, generic=source.class_of(tokenizer) == GENERIC)
        if (source.path / tokenizer / "tokenizer_config.json").is_file():
            require_right(source.path / tokenizer, source.config(tokenizer))
    encoder = recipe.component(folder)
    if encoder.tokens > most_tokens:
        raise RecipeError(
            "the model does not take prompts of this length",
            where=f"{recipe.name}: components.{folder}.tokens",
            expected=f"at most {most_tokens}",
            got=encoder.tokens,
        )
    last = f"encoder.block.{layers - 1}.layer.1.DenseReluDense.wo"
    parents = [last[:i] for i, c in enumerate(f"{last}.") if c == "."]
    kept = any(fnmatch.fnmatchcase(name, pattern) for name in parents for pattern in encoder.keep_float32)
    if encoder.dtype == "float16" and not kept:
        raise RecipeError(
            "T5 overflows in float16: the sum over its blocks would be infinite",
            where=f"{recipe.name}: components.{folder}",
            expected=f'keep_float32 = ["{T5_WIDE}"], which transformers does by itself, or dtype = "bfloat16"',
            got=f'dtype = "float16", keep_float32 = {list(encoder.keep_float32)}',
        )


def check_equal(source: ModelSource, network: str, key: str, expected: int, of: str) -> None:
    """ModelError unless a setting of the denoising network is what the text encoders `of` it give."""
    got = source.setting(network, key)
    if any(value != expected for value in (got if isinstance(got, list) and got else [got])):  # block by block
        raise ModelError(
            "the text encoder does not fit the UNet" if network == "unet" else f"{of} does not fit the {network}",
            where=source.path / network / "config.json",
            expected=f"{key} = {expected}, {of}",
            got=got,
            hint="the folder mixes components of two models; download it again",
        )


def check_channels(source: ModelSource, network: str, expected: int) -> None:
    """ModelError unless the denoising network takes the VAE's latents and nothing beside them, and gives the same."""
    got = source.setting(network, "in_channels")
    if got != expected:
        raise ModelError(
            f"the {'UNet' if network == 'unet' else network} takes other channels than the VAE's latents: inpainting "
            "and instruction models are not supported",
            where=source.path / network / "config.json",
            expected=f"in_channels = {expected}",
            got=got,
        )


def check_positions(recipe: Recipe, most_pixels: int, where: str) -> None:
    """RecipeError for a bucket with a side beyond what the network can position-encode."""
    for bucket in recipe.buckets:
        if max(bucket.height, bucket.width) > most_pixels:
            raise RecipeError(
                "the model cannot position-encode a bucket",
                where=f"{recipe.name}: buckets",
                expected=f"sides of at most {most_pixels} pixels ({where})",
                got=bucket,
                hint="remove the bucket from the recipe",
            )


def check_vae(source: ModelSource, factors: Factors) -> None:
    """ModelError for a VAE of other channels than pictures have, and without what the pipeline reads of its config."""
    config, where = source.config("vae"), source.path / "vae" / "config.json"
    latents = source.setting("vae", "latent_channels")
    check_sizes(source, {("vae", "latent_channels"): latents})
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            what = "the VAE's pictures have other channels than red, green and blue"
            raise ModelError(what, where=where, expected=f"{key} = 3", got=config[key])
    try:
        scale_and_shift = factors(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            "the VAE's config does not say how latents are scaled",
            where=where,
            expected="numbers: scaling_factor; shift_factor of SD3 and FLUX; latents_mean and latents_std, if any",
            got=f"{type(error).__name__}: {error}",
        ) from error
    for factor in scale_and_shift:
        if isinstance(factor, tuple) and len(factor) != latents:
            what = "the VAE's latents are normalised in other channels than they have"
            expected = f"latents_mean and latents_std of {latents} numbers, its latent_channels"
            raise ModelError(what, where=where, expected=expected, got=f"{len(factor)} numbers")


def check_unet_output(source: ModelSource, latent_channels: int) -> None:
    """ModelError for a UNet that output has other channels than its input, such as a variance beside the noise."""
    got = source.config("unet").get("out_channels", 4)
    if got != latent_channels:
        where = source.path / "unet" / "config.json"
        expected = f"out_channels = {latent_channels}"
        raise ModelError("the UNet's output has other channels than its input", where=where, expected=expected, got=got)


def refuse_unet_settings(source: ModelSource, foreign: dict[str, str], family: str) -> None:
    """ModelError for a UNet with a setting that belongs to another kind of model."""
    for setting, reason in foreign.items():
        value = source.config("unet").get(setting)
        if value is not None:
            where = source.path / "unet" / "config.json"
            raise ModelError(
                f"family {family} does not cover this UNet: {reason}", where=where, got=f"{setting} = {value!r}"
            )


def check_safety_checker(source: ModelSource, recipe: Recipe) -> None:
    """ModelError for a checker that is to be compiled and is not there, or not the one that this compiles."""
    if not recipe.safety.checker:
        return
    for name, classes in ((safety.CHECKER, safety.CLASSES), (safety.EXTRACTOR, safety.EXTRACTORS)):
        entry = source.index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1] in classes):
            raise ModelError(
                f"the model has no {name.replace('_', ' ')} that could be compiled",
                where=source.path / "model_index.json",
                expected=" or ".join(classes),
                got=repr(entry),
                hint="remove safety.checker from the recipe, or take a model that comes with one",
            )
    refuse_code(source, safety.CHECKER)
    safety.extracted(source)
