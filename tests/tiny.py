"""Small models in diffusers' format with seeded random weights, made by the tests: nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WORDS = ("a", "red", "blue", "circle", "square", "on", "white", "background", "left", "of")
TEXT_LENGTH = 24


def write_tokenizer(folder: Path) -> None:
    """A byte-level CLIP vocabulary in which `WORDS` are one token each."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    symbols = [chr(b) for b in plain] + [chr(256 + i) for i in range(256 - len(plain))]
    merges: list[tuple[str, str]] = []
    for word in WORDS:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            if (pieces[0], pieces[1]) not in merges:
                merges.append((pieces[0], pieces[1]))
            pieces = [pieces[0] + pieces[1], *pieces[2:]]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    vocabulary = {t: i for i, t in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")


def make_sd(folder: Path, *, prediction_type: str = "epsilon", seed: int = 0, **save: Any) -> Path:
    """A StableDiffusionPipeline folder: 64x64 pixels, 8x8x4 latents. `save` goes to save_pretrained."""
    import torch
    from diffusers import PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    tokenizer = clip_tokenizer(folder / "tokenizer")
    torch.manual_seed(seed)
    text = clip_text(tokenizer)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
        cross_attention_dim=32,
        norm_num_groups=8,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        steps_offset=1,
        prediction_type=prediction_type,
    )
    pipeline = StableDiffusionPipeline(
        make_vae(4), text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder, **save)
    leave_samples(folder)
    return folder


def clip_tokenizer(folder: Path, **options: Any) -> Any:
    from transformers import CLIPTokenizer

    write_tokenizer(folder)
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TEXT_LENGTH, **options)


def clip_text(tokenizer: Any, cls: str = "CLIPTextModel", *, width: int = 32, layers: int = 2, **config: Any) -> Any:
    """`config` goes before what is read off the tokenizer."""
    import transformers

    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    made = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=layers,
        num_attention_heads=2,
        max_position_embeddings=TEXT_LENGTH,
        **tokens | config,
    )
    return getattr(transformers, cls)(made)


def two_clip_tokenizers(folder: Path) -> list[Any]:
    """Of SDXL and SD3: the second pads with another token than it ends with, as in the published models."""
    return [clip_tokenizer(folder / "tokenizer"), clip_tokenizer(folder / "tokenizer_2", pad_token="!")]


def loud_clip_text(tokenizer: Any, cls: str, **config: Any) -> Any:
    """The library draws values so small that every prompt would give nearly the same picture."""
    import torch

    text = clip_text(tokenizer, cls, **config)
    for parameter in text.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=2 / parameter.shape[1] ** 0.5)
    return text


def make_vae(channels: int, **config: Any) -> Any:
    """64x64 pixels -> 8x8 latents."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(16, 16, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=64,
        **config,
    )


def leave_samples(folder: Path) -> None:
    """As in the published configs: the model's own scheduler reads neither, DDIM and PNDM made from this config do."""
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"clip_sample": False, "skip_prk_steps": True}, indent=2))


def recipe_for(component: str = "", *, family: str = "sd", guided: bool = True, **own: Any) -> Any:
    """A recipe in which one component has settings of its own: dtype, keep_float32, tokens."""
    from toolchain.recipe import Bucket, Check, ComponentRecipe, Recipe

    return Recipe(
        name="tiny",
        family=family,
        buckets=(Bucket(1, 64, 64),),
        classifier_free_guidance=guided,
        components={component: ComponentRecipe(**own)} if component else {},
        check=Check(prompts=("a",)),
    )


RECIPE = """\
family = "sd"
buckets = ["1x64x64", "2x64x96"]

[sampling]
scheduler = "euler"
steps = 4
guidance = 5.0
schedulers = ["model", "euler", "euler-a"]
step_counts = [4]

[check]
prompts = ["a red circle on a white background", "a blue square"]
seeds = [0, 1]
psnr_db = 60.0
ssim = 0.999
"""
