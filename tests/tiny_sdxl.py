"""A small SDXL model in diffusers' format with seeded random weights: nothing is downloaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.tiny import leave_samples, loud_clip_text, make_vae, two_clip_tokenizers

WIDTHS = {"text_encoder": 32, "text_encoder_2": 48}
LAYERS = {"text_encoder": 3, "text_encoder_2": 4}
POOLED = 40
TIME_EMBEDDING = 8


def make_sdxl(folder: Path, *, zero_negative: bool = True, seed: int = 0, **save: Any) -> Path:
    """A StableDiffusionXLPipeline folder: 64x64 pixels, 8x8x4 latents. `save` goes to save_pretrained.

    Both encoders, their depths and the pooled prompt differ in size, so that none can stand in for another.
    """
    import torch
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    tokenizers = two_clip_tokenizers(folder)
    torch.manual_seed(seed)
    first, second = (_text(name, t) for name, t in zip(WIDTHS, tokenizers, strict=True))
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    pipeline = StableDiffusionXLPipeline(
        make_vae(4, scaling_factor=0.13025),
        first,
        second,
        *tokenizers,
        _unet(),
        scheduler,
        force_zeros_for_empty_prompt=zero_negative,
    )
    pipeline.save_pretrained(folder, **save)
    leave_samples(folder)
    return folder


def _text(name: str, tokenizer: Any) -> Any:
    first = name == "text_encoder"
    cls, act = ("CLIPTextModel", "quick_gelu") if first else ("CLIPTextModelWithProjection", "gelu")
    sizes = {"width": WIDTHS[name], "layers": LAYERS[name], "projection_dim": POOLED}
    return loud_clip_text(tokenizer, cls, hidden_act=act, **sizes)


def _unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4),
        use_linear_projection=True,
        cross_attention_dim=sum(WIDTHS.values()),
        addition_embed_type="text_time",
        addition_time_embed_dim=TIME_EMBEDDING,
        projection_class_embeddings_input_dim=POOLED + 6 * TIME_EMBEDDING,
        norm_num_groups=8,
    )


def recipe_text(*, guided: bool = True, buckets: tuple[str, ...] = ("1x64x64", "2x64x96")) -> str:
    return f"""\
family = "sdxl"
buckets = {list(buckets)}
classifier_free_guidance = {str(guided).lower()}

[sampling]
steps = 4
step_counts = [4]

[check]
prompts = ["a red circle on a white background"]
psnr_db = 60.0
""".replace("'", '"')
