"""Components that families share: text encoders and both halves of a VAE, and checks of their configs."""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError, RecipeError
from toolchain.models.component import Component
from toolchain.models.refusals import refuse_code, refuse_quantized
from toolchain.models.source import ModelSource
from toolchain.models.tokenizers import GENERIC, require_right, require_vocabulary
from toolchain.recipe import Bucket, Recipe
from toolchain.sampler.schedulers import layout_for
from toolchain.sampler.table import MAX_EVALUATIONS
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

CLIP_TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast", GENERIC)
T5_TOKENIZERS = ("T5Tokenizer", "T5TokenizerFast", GENERIC)
# A config's own attention may be a kernel that transformers would fetch from the hub and run; its other settings of
# these names choose what a call gives beside the tensors that are used.
OWN_OPTIONS = {"attn_implementation": "sdpa", "output_attentions": False, "return_dict": True}
CLIP_LENGTH = 77
# Where T5 exceeds float16 first: https://github.com/huggingface/transformers/issues/5651
T5_WIDE = "encoder.block.*.layer.1.DenseReluDense.wo"


def vae_factor(source: ModelSource) -> int:
    """Pixels per latent along each side."""
    return int(2 ** (len(source.setting("vae", "block_out_channels")) - 1))


def latent_shape(source: ModelSource, bucket: Bucket) -> tuple[int, int, int, int]:
    """[B, C, h, w]"""
    factor = vae_factor(source)
    return bucket.batch, int(source.setting("vae", "latent_channels")), bucket.height // factor, bucket.width // factor


def clip_length(source: ModelSource, folder: str) -> int:
    """Tokens that a CLIP text encoder takes."""
    return int(source.config(folder).get("max_position_embeddings", CLIP_LENGTH))


def clip_layers(source: ModelSource, folder: str) -> int:
    """Layers of a CLIP text encoder."""
    layers: int = source.config(folder).get("num_hidden_layers", 12)
    return layers


def step_spec(
    latents: tuple[int, ...],
    inputs: Mapping[str, tuple[int, ...]],
    scheduler: Mapping[str, Any],
    noise: tuple[int, ...] = (),
) -> GraphSpec:
    """The signature of a step graph: the sampler's tensors, then the family's own `inputs`, all float32.

    `scheduler` is the model's config of it, which decides what the step must have room for.
    `noise` is the layout in which the diffusers pipeline draws it, where that is not the latents' [B, C, h, w].
    """
    layout = layout_for(scheduler)
    state = TensorSpec("state", "float32", (layout.states, *latents))
    own = {
        "timesteps": (MAX_EVALUATIONS,),
        "table": (MAX_EVALUATIONS, layout.width),
        "noise": noise or latents,
        "guidance": (1,),
        **inputs,
    }
    return GraphSpec(
        (state, TensorSpec("step", "int64", (1,)), *(TensorSpec(n, "float32", shape) for n, shape in own.items())),
        (TensorSpec("next_state", "float32", state.shape), TensorSpec("next_step", "int64", (1,))),
    )


def clip_text_encoder(
    folder: str,
    *,
    cls: str,
    layer: int | None,
    normed: bool = False,
    context: str = "",
    pooled: str = "",
    masks: bool = False,
) -> Component:
    """A CLIP text encoder whose outputs are called `context` [1, L, E] and `pooled` [1, P]; "" leaves one out.

    cls    CLIPTextModel or CLIPTextModelWithProjection
    layer  see `modules.ClipTextEncoder`
    masks  whether the family's pipeline reads the config's use_attention_mask, which hides padding
    """

    def spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
        length = clip_length(source, folder)
        width = int(source.setting(folder, "hidden_size"))
        projected = int(source.setting(folder, "projection_dim")) if "Projection" in cls else width
        skip = (TensorSpec("clip_skip", "int64", (1,)),) if layer is not None else ()
        mask = (TensorSpec("mask", "int64", (1, length)),) if masks and _hides_padding(source, folder) else ()
        outputs = {context: (1, length, width), pooled: (1, projected)}
        return GraphSpec(
            (TensorSpec("ids", "int64", (1, length)), *skip, *mask),
            tuple(TensorSpec(name, "float32", shape) for name, shape in outputs.items() if name),
        )

    def wrap(text: nn.Module) -> nn.Module:
        from toolchain.models.modules import ClipTextEncoder

        return ClipTextEncoder(text, layer=layer, normed=normed, pooled=bool(pooled))

    def module(source: ModelSource, recipe: Recipe) -> nn.Module:
        import transformers

        from toolchain.models.modules import construct

        own = recipe.component(folder)
        # The model with projection builds its inner model in the config's dtype, whatever the default is.
        own_keys = ("dtype", "torch_dtype", "attn_implementation", "_attn_implementation")
        given = {key: value for key, value in source.config(folder).items() if key not in own_keys}
        config = transformers.CLIPTextConfig(**given | OWN_OPTIONS | {"dtype": own.dtype})
        return wrap(construct(lambda: getattr(transformers, cls)(config), own.dtype, own.keep_float32, folder))

    def reference(source: ModelSource, recipe: Recipe) -> nn.Module:
        return wrap(load_text_encoder(source, folder, cls))

    tokenizer = folder.replace("text_encoder", "tokenizer")
    return Component(folder, folder, "text.", False, True, spec, module, reference, tokenizer)


def _hides_padding(source: ModelSource, folder: str) -> bool:
    return bool(source.config(folder).get("use_attention_mask"))


def t5_text_encoder(folder: str, *, context: str, tokens: int, optional: bool) -> Component:
    """A T5 encoder whose output is called `context` [1, L, E]; `tokens` is L where the recipe does not say."""

    def spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
        length = recipe.component(folder).tokens or tokens
        return GraphSpec(
            (TensorSpec("ids", "int64", (1, length)),),
            (TensorSpec(context, "float32", (1, length, int(source.setting(folder, "d_model")))),),
        )

    def module(source: ModelSource, recipe: Recipe) -> nn.Module:
        from transformers import T5Config, T5EncoderModel

        from toolchain.models.modules import T5TextEncoder, construct

        config = T5Config(**source.config(folder))
        own = recipe.component(folder)
        return T5TextEncoder(construct(lambda: T5EncoderModel(config), own.dtype, own.keep_float32, folder))

    def reference(source: ModelSource, recipe: Recipe) -> nn.Module:
        from toolchain.models.modules import T5TextEncoder

        return T5TextEncoder(load_text_encoder(source, folder, "T5EncoderModel"))

    tokenizer = folder.replace("text_encoder", "tokenizer")
    return Component(folder, folder, "text.", False, True, spec, module, reference, tokenizer, optional)


def load_text_encoder(source: ModelSource, folder: str, cls: str) -> nn.Module:
    """A transformers model with the checkpoint's weights in float32."""
    import transformers

    return _load(getattr(transformers, cls), source, folder, **({} if cls.startswith("T5") else OWN_OPTIONS))


def load_network(source: ModelSource, folder: str, cls: str) -> nn.Module:
    """A diffusers model with the checkpoint's weights in float32."""
    import diffusers

    return _load(getattr(diffusers, cls), source, folder)


def _load(cls: Any, source: ModelSource, folder: str, **options: Any) -> nn.Module:
    import torch

    variant = source.variant(folder)
    made = cls.from_pretrained(
        source.path / folder, dtype=torch.float32, use_safetensors=True, variant=variant, **options
    )
    module: nn.Module = made.eval()
    return module


def make_network(source: ModelSource, folder: str, cls: str, recipe: Recipe, component: str) -> nn.Module:
    """A diffusers model from its config alone, in the recipe's precision."""
    import diffusers

    from toolchain.models.modules import construct

    config, own = source.config(folder), recipe.component(component)
    return construct(lambda: getattr(diffusers, cls).from_config(config), own.dtype, own.keep_float32, component)


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
    """What planning computes shapes from, (folder, setting) -> value: whole numbers above 0, and the VAE's blocks."""
    for (folder, key), value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            where = source.path / folder / "config.json"
            raise ModelError(f"{key} is no size", where=where, expected="a whole number above 0", got=repr(value))
    blocks = source.setting("vae", "block_out_channels")
    if not isinstance(blocks, list) or not blocks:
        where = source.path / "vae" / "config.json"
        raise ModelError("block_out_channels is no list of sizes", where=where, got=repr(blocks))


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
    own = recipe.component(folder)
    if own.tokens > most_tokens:
        raise RecipeError(
            "the model takes no prompts of this length",
            where=f"{recipe.name}: components.{folder}.tokens",
            expected=f"at most {most_tokens}",
            got=own.tokens,
        )
    last = f"encoder.block.{layers - 1}.layer.1.DenseReluDense.wo"
    parents = [last[:i] for i, c in enumerate(f"{last}.") if c == "."]
    kept = any(fnmatch.fnmatchcase(name, pattern) for name in parents for pattern in own.keep_float32)
    if own.dtype == "float16" and not kept:
        raise RecipeError(
            "T5 overflows in float16: the sum over its blocks would be infinite",
            where=f"{recipe.name}: components.{folder}",
            expected=f'keep_float32 = ["{T5_WIDE}"], which transformers does by itself, or dtype = "bfloat16"',
            got=f'dtype = "float16", keep_float32 = {list(own.keep_float32)}',
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
