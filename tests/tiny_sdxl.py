"""A small SDXL model in diffusers' format with seeded random weights: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import TEXT_LENGTH, write_tokenizer

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

    tokenizers = [_tokenizer(folder / "tokenizer"), _tokenizer(folder / "tokenizer_2", pad_token="!")]
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
        _vae(), first, second, *tokenizers, _unet(), scheduler, force_zeros_for_empty_prompt=zero_negative
    )
    pipeline.save_pretrained(folder, **save)
    # As in the published config: Euler does not read it, DDIM made from this config does.
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False}, indent=2))
    return folder


def _tokenizer(folder: Path, **options: Any) -> Any:
    """The second one pads with another token than it ends with, as SDXL's does."""
    from transformers import CLIPTokenizer

    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH, **options)


def _text(name: str, tokenizer: Any) -> Any:
    import torch
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTHS[name],
        intermediate_size=64,
        num_hidden_layers=LAYERS[name],
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        projection_dim=POOLED,
        hidden_act="quick_gelu" if name == "text_encoder" else "gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    made: Any = CLIPTextModel(config) if name == "text_encoder" else CLIPTextModelWithProjection(config)
    # The library draws values so small that every prompt would give nearly the same picture.
    for parameter in made.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
    return made


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


def _vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.13025,
    )


def recipe_text(*, guided: bool = True, buckets: tuple[str, ...] = ("1x64x64", "2x64x96")) -> str:
    return f"""\
family = "sdxl"
buckets = {list(buckets)}
classifier_free_guidance = {str(guided).lower()}

[sampling]
steps = 4

[check]
prompts = ["a red circle on a white background"]
psnr_db = 60.0
""".replace("'", '"')
