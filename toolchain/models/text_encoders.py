"""Text encoders as components: CLIP and T5."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from toolchain.models.component import Component
from toolchain.models.networks import load_weights
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

# A config's own attention may be a kernel that transformers would fetch from the hub and run; its other settings of
# these names choose what a call gives beside the tensors that are used.
OWN_OPTIONS = {"attn_implementation": "sdpa", "output_attentions": False, "return_dict": True}
CLIP_LENGTH = 77
"""Tokens of a CLIP text encoder whose config is silent."""


def clip_length(source: ModelSource, folder: str) -> int:
    """Tokens that a CLIP text encoder takes."""
    return int(source.config(folder).get("max_position_embeddings", CLIP_LENGTH))


def clip_layers(source: ModelSource, folder: str) -> int:
    """Layers of a CLIP text encoder."""
    layers: int = source.config(folder).get("num_hidden_layers", 12)
    return layers


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
    layer  see `text_module.ClipTextEncoder`
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
        from toolchain.models.text_module import ClipTextEncoder

        return ClipTextEncoder(text, layer=layer, normed=normed, pooled=bool(pooled))

    def module(source: ModelSource, recipe: Recipe) -> nn.Module:
        import transformers

        from toolchain.models.construct import construct

        precision = recipe.component(folder)
        # The model with projection builds its inner model in the config's dtype, whatever the default is.
        decided = ("dtype", "torch_dtype", "attn_implementation", "_attn_implementation")
        given = {key: value for key, value in source.config(folder).items() if key not in decided}
        config = transformers.CLIPTextConfig(**given | OWN_OPTIONS | {"dtype": precision.dtype})
        return wrap(
            construct(lambda: getattr(transformers, cls)(config), precision.dtype, precision.keep_float32, folder)
        )

    def reference(source: ModelSource, recipe: Recipe) -> nn.Module:
        import transformers

        return wrap(load_weights(getattr(transformers, cls), source, folder, **OWN_OPTIONS))

    return _component(folder, spec, module, reference)


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

        from toolchain.models.construct import construct
        from toolchain.models.text_module import T5TextEncoder

        config = T5Config(**source.config(folder))
        precision = recipe.component(folder)
        return T5TextEncoder(construct(lambda: T5EncoderModel(config), precision.dtype, precision.keep_float32, folder))

    def reference(source: ModelSource, recipe: Recipe) -> nn.Module:
        from transformers import T5EncoderModel

        from toolchain.models.text_module import T5TextEncoder

        return T5TextEncoder(load_weights(T5EncoderModel, source, folder))

    return _component(folder, spec, module, reference, optional=optional)


def _component(
    folder: str,
    spec: Callable[[ModelSource, Bucket, Recipe], GraphSpec],
    module: Callable[[ModelSource, Recipe], nn.Module],
    reference: Callable[[ModelSource, Recipe], nn.Module],
    *,
    optional: bool = False,
) -> Component:
    return Component(
        name=folder,
        folder=folder,
        prefix="text.",
        per_bucket=False,
        spec=spec,
        module=module,
        reference=reference,
        tokenizer=folder.replace("text_encoder", "tokenizer"),
        optional=optional,
    )
