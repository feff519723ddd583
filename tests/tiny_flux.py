"""A small FLUX.1 in diffusers' format with seeded random weights: 64x64 pictures are 16 tokens."""

from __future__ import annotations

from pathlib import Path

from tests.tiny import TEXT_LENGTH, write_tokenizer
from tests.tiny_t5 import write_t5_tokenizer

T5_TOKENS = 20
DEV_SHIFT = {"shift": 3.0, "use_dynamic_shifting": True}
SCHNELL_SHIFT = {"shift": 1.0, "use_dynamic_shifting": False}


def make_flux(folder: Path, *, guidance_embeds: bool = True, eos_token_id: int | None = None, seed: int = 0) -> Path:
    """A FluxPipeline folder: dev with `guidance_embeds`, else schnell.

    eos_token_id  of the CLIP config, which decides how the pooled output is found: 2 in the published models, whatever
                  the tokenizer's is; None takes the tokenizer's
    """
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer, T5Config, T5EncoderModel, T5Tokenizer

    write_tokenizer(folder / "tokenizer")
    write_t5_tokenizer(folder / "tokenizer_2")
    clip_tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer", model_max_length=TEXT_LENGTH)
    t5_tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer_2", model_max_length=T5_TOKENS)
    torch.manual_seed(seed)
    clip = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(clip_tokenizer),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=TEXT_LENGTH,
            bos_token_id=clip_tokenizer.bos_token_id,
            eos_token_id=clip_tokenizer.eos_token_id if eos_token_id is None else eos_token_id,
            pad_token_id=clip_tokenizer.pad_token_id,
        )
    )
    t5 = T5EncoderModel(
        T5Config(
            vocab_size=len(t5_tokenizer),
            d_model=48,
            d_kv=8,
            d_ff=64,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            is_encoder_decoder=False,
            use_cache=False,
            tie_word_embeddings=False,
        )
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=48,
        pooled_projection_dim=32,
        guidance_embeds=guidance_embeds,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=16,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    with torch.no_grad():  # as they come, gates are nearly shut and attention is even: the prompts would not show
        for name, parameter in transformer.named_parameters():
            if parameter.ndim == 2:
                parameter *= 3
            elif ".norm_" in name:
                parameter *= 2
    shift = DEV_SHIFT if guidance_embeds else SCHNELL_SHIFT
    scheduler = FlowMatchEulerDiscreteScheduler(base_shift=0.5, max_shift=1.15, **shift)
    pipeline = FluxPipeline(scheduler, vae, clip, clip_tokenizer, t5, t5_tokenizer, transformer)
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
