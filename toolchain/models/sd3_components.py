"""What is compiled of Stable Diffusion 3 and 3.5: its components, and nothing else of the family."""

from __future__ import annotations

from typing import TYPE_CHECKING

from toolchain.models.component import Component
from toolchain.models.denoiser import denoiser
from toolchain.models.source import ModelSource
from toolchain.models.text_encoders import clip_length, clip_text_encoder, t5_text_encoder
from toolchain.models.vae import shifted, vae_decoder, vae_encoder
from toolchain.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

CLIPS = ("text_encoder", "text_encoder_2")
T5 = "text_encoder_3"
# The hidden state that both CLIP text encoders give, counted from the last.
PENULTIMATE = 2
T5_TOKENS = 256
"""The pipeline's default, and how many zeros stand for T5's tokens where it is left out."""


def _inputs(source: ModelSource, recipe: Recipe, rows: int) -> dict[str, tuple[int, ...]]:
    length = clip_length(source, CLIPS[0])
    widths = [int(source.setting(folder, "hidden_size")) for folder in CLIPS]
    projections = [int(source.setting(folder, "projection_dim")) for folder in CLIPS]
    inputs: dict[str, tuple[int, ...]] = {
        "context": (rows, length, widths[0]),
        "context_2": (rows, length, widths[1]),
        "pooled": (rows, projections[0]),
        "pooled_2": (rows, projections[1]),
    }
    if T5 not in recipe.without:
        tokens = recipe.component(T5).tokens or T5_TOKENS
        inputs["context_3"] = (rows, tokens, int(source.setting(T5, "d_model")))
    return inputs


def _step(transformer: nn.Module, source: ModelSource, recipe: Recipe, dtype: str) -> nn.Module:
    from toolchain.models.sd3_step import SD3Step

    width = int(source.setting("transformer", "joint_attention_dim"))
    guided = recipe.classifier_free_guidance
    return SD3Step(transformer, guided=guided, width=width, empty=T5_TOKENS, dtype=dtype)


def _clip(folder: str, context: str, pooled: str) -> Component:
    cls = "CLIPTextModelWithProjection"
    return clip_text_encoder(folder, cls=cls, layer=PENULTIMATE, context=context, pooled=pooled)


COMPONENTS: tuple[Component, ...] = (
    _clip("text_encoder", "context", "pooled"),
    _clip("text_encoder_2", "context_2", "pooled_2"),
    t5_text_encoder(T5, context="context_3", tokens=T5_TOKENS, optional=True),
    denoiser("transformer", cls="SD3Transformer2DModel", inputs=_inputs, wrap=_step),
    vae_decoder(shifted),
    vae_encoder(shifted),
)
