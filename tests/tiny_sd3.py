"""A small Stable Diffusion 3 model in diffusers' format with seeded random weights: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import loud_clip_text, make_vae, two_clip_tokenizers
from tests.tiny_t5 import t5_encoder, t5_tokenizer

WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
LAYERS = {"text_encoder": 3, "text_encoder_2": 4}
POOLED = {"text_encoder": 24, "text_encoder_2": 40}
T5_WIDTH = 96
T5_TOKENS = 20
CHANNELS = 16
POSITIONS = 8
"""Tokens along each side that the network has positions for: 128 pixels."""


def make_sd3(folder: Path, *, version: str = "3.5", t5: bool = True, dynamic: bool = False, seed: int = 0) -> Path:
    """A StableDiffusion3Pipeline folder: 64x64 pixels, 8x8x16 latents.

    version  "3", or "3.5" with its second attention and normalised queries and keys
    t5       without it the third text encoder and its tokenizer are null, as in folders of the model without T5
    dynamic  whether the scheduler shifts by the number of tokens

    Widths, depths and pooled prompts of the encoders differ, so that none can stand in for another.
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline

    tokenizers = two_clip_tokenizers(folder)
    torch.manual_seed(seed)
    texts = [_text(name, t) for name, t in zip(WIDTHS, tokenizers, strict=True)]
    tokenizer_3 = t5_tokenizer(folder / "tokenizer_3", T5_TOKENS) if t5 else None
    third = t5_encoder(tokenizer_3, width=T5_WIDTH) if t5 else None
    pipeline = StableDiffusion3Pipeline(
        _transformer(version),
        FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic),
        make_vae(CHANNELS, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False, use_post_quant_conv=False),
        texts[0],
        tokenizers[0],
        texts[1],
        tokenizers[1],
        third,
        tokenizer_3,
    )
    pipeline.save_pretrained(folder)
    return folder


def recipe_text(*, guided: bool = True, t5: bool = True, bucket: str = "2x64x96") -> str:
    """A recipe in float32 for one bucket."""
    tokens = f"[components.text_encoder_3]\ntokens = {T5_TOKENS}\n" if t5 else ""
    return f"""\
family = "sd3"
buckets = ["{bucket}"]
classifier_free_guidance = {str(guided).lower()}
without = {"[]" if t5 else '["text_encoder_3"]'}

{tokens}
[sampling]
scheduler = "model"
steps = 4
guidance = {4.5 if guided else 1.0}
schedulers = ["model"]
step_counts = [4]

[check]
prompts = ["a red circle"]
psnr_db = 60.0
"""


def _text(name: str, tokenizer: Any) -> Any:
    act = "quick_gelu" if name == "text_encoder" else "gelu"
    sizes = {"width": WIDTHS[name], "layers": LAYERS[name], "projection_dim": POOLED[name]}
    return loud_clip_text(tokenizer, "CLIPTextModelWithProjection", hidden_act=act, **sizes)


def _transformer(version: str) -> Any:
    import torch
    from diffusers import SD3Transformer2DModel

    later = version == "3.5"
    transformer = SD3Transformer2DModel(
        sample_size=8,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=T5_WIDTH,
        caption_projection_dim=32,
        pooled_projection_dim=sum(POOLED.values()),
        pos_embed_max_size=POSITIONS,
        dual_attention_layers=(0,) if later else (),
        qk_norm="rms_norm" if later else None,
    )
    # Positions are tensors of the checkpoint: with other values than the formula's it shows where they come from.
    transformer.pos_embed.pos_embed.add_(torch.randn(transformer.pos_embed.pos_embed.shape) / 2)
    return transformer
