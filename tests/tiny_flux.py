"""A small FLUX.1 in diffusers' format with seeded random weights: 64x64 pictures are 16 tokens."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import clip_text, clip_tokenizer, make_vae
from tests.tiny_t5 import t5_encoder, t5_tokenizer

T5_TOKENS = 20
DEV_SHIFT = {"shift": 3.0, "use_dynamic_shifting": True}
SCHNELL_SHIFT = {"shift": 1.0, "use_dynamic_shifting": False}


def make_flux(
    folder: Path,
    *,
    guidance_embeds: bool = True,
    eos_token_id: int | None = None,
    seed: int = 0,
    t5_width: int = 48,
    heads: int = 2,
) -> Path:
    """A FluxPipeline folder: dev with `guidance_embeds`, else schnell. The denoiser is 16 `heads` wide.

    eos_token_id  of the CLIP config, which decides how the pooled output is found: 2 in the published models, whatever
                  the tokenizer's is; None takes the tokenizer's
    """
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    tokenizer, tokenizer_2 = clip_tokenizer(folder / "tokenizer"), t5_tokenizer(folder / "tokenizer_2", T5_TOKENS)
    torch.manual_seed(seed)
    clip = clip_text(tokenizer, **({} if eos_token_id is None else {"eos_token_id": eos_token_id}))
    t5 = t5_encoder(tokenizer_2, width=t5_width)
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=heads,
        joint_attention_dim=t5_width,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = make_vae(16, scaling_factor=0.3611, shift_factor=0.1159, use_quant_conv=False, use_post_quant_conv=False)
    with torch.no_grad():  # as they come, gates are nearly shut and attention is even: the prompts would not show
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2:
                parameter *= 3
            elif ".norm_" in name:
                parameter *= 2
    shift = DEV_SHIFT if guidance_embeds else SCHNELL_SHIFT
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.5, max_shift=1.15, **shift)
    pipeline = FluxPipeline(scheduler, vae, clip, tokenizer, t5, tokenizer_2, transformer)
    pipeline.save_pretrained(folder)
    return folder


def recipe_text(*, guided: bool, bucket: str, without: tuple[str, ...] = ()) -> str:
    return f"""\
family = "flux"
buckets = ["{bucket}"]
classifier_free_guidance = {str(guided).lower()}
without = {list(without)}

[components.text_encoder_2]
tokens = {T5_TOKENS}

[sampling]
scheduler = "model"
steps = 4
guidance = 3.5
schedulers = ["model"]
step_counts = [4]

[check]
prompts = ["a red circle on a white background", "a blue square"]
seeds = [0, 1]
psnr_db = 60.0
ssim = 0.999
"""
