"""Trains the bundled model: a small StableDiffusionPipeline that draws coloured shapes.

    python examples/shapes/train.py --output examples/shapes/model

The tokenizer is written by hand, the VAE is trained first and must pass a gate (every palette colour within 10 levels
and 30 dB), the text encoder learns to say what its captions say, then it and the UNet are trained together on cached
latents. Everything is seeded. On a CPU it uses `--threads` cores; a GPU is taken when there is one.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors.torch import load_file
from scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZE, Scene, Thing, all_scenes, draw
from torch import Tensor
from torch.nn import functional
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

PICTURES = 30_000
VAE_RATE = 1e-3
VAE_STEPS, VAE_BATCH = 5_200, 8
DENOISER_STEPS, DENOISER_BATCH = 4_200, 32
LATENT_NOISE = 0.1
LATENT_CHANNELS = 8  # with 4 a 22-minute VAE stopped at 24 dB and lost colours
TEXT_RATE = 5e-4
TEXT_STEPS, TEXT_BATCH = 1_000, 64
EMPTY_PROMPT_SHARE = 0.1
PLACES = ("left", "right", "top", "bottom", "centre")
TOKENS = 32  # the longest caption has 16


def byte_symbols() -> dict[int, str]:
    """The printable stand-in of every byte, as GPT-2 and CLIP tokenizers spell it."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [b for b in range(256) if b not in plain]
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}


def write_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE whose merges spell the vocabulary: known words are one token, all else falls back to bytes."""
    words = sorted({"a", "an", "on", "background", *SHAPES, *COLOURS, *BACKGROUNDS, *" ".join(RELATIONS).split()})
    symbols = list(byte_symbols().values())
    merges: list[tuple[str, str]] = []
    for word in words:
        pieces = [*word[:-1], word[-1] + "</w>"]
        while len(pieces) > 1:
            pair = (pieces[0], pieces[1])
            if pair not in merges:
                merges.append(pair)
            pieces = ["".join(pair), *pieces[2:]]
    tokens = [*symbols, *(s + "</w>" for s in symbols), *("".join(m) for m in merges)]
    vocabulary = {t: i for i, t in enumerate([*dict.fromkeys(tokens), "<|startoftext|>", "<|endoftext|>"])}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(" ".join(m) for m in merges) + "\n")
    return CLIPTokenizer.from_pretrained(folder, model_max_length=TOKENS)


def make_models(tokenizer: CLIPTokenizer) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    # Head size 32 and channels in multiples of 32 throughout the denoiser: what fused attention and int8 kernels want.
    vae = AutoencoderKL(
        block_out_channels=(16, 32, 64, 128),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=LATENT_CHANNELS,
        layers_per_block=1,
        norm_num_groups=8,
        sample_size=SIZE,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=128,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            max_position_embeddings=TOKENS,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=SIZE // 8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        block_out_channels=(64, 128),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=(2, 4),  # diffusers reads this as the number of heads
        cross_attention_dim=128,
        norm_num_groups=16,
    )
    return vae, text, unet


def to_model_range(pictures: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    return peak * min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * step / steps))


class Average:
    """Exponential moving average of a model's weights."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = copy.deepcopy(model).eval().requires_grad_(False)

    @torch.no_grad()
    def update(self, model: torch.nn.Module, step: int) -> None:
        decay = min(0.998, (1 + step) / (10 + step))
        for target, source in zip(self.model.parameters(), model.parameters(), strict=True):
            target.lerp_(source, 1 - decay)


def log(started: float, message: str) -> None:
    print(f"[{time.monotonic() - started:7.0f} s] {message}", flush=True)


def train_vae(vae: AutoencoderKL, pictures: np.ndarray, steps: int, device: str, started: float) -> AutoencoderKL:
    rng = np.random.default_rng(1)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=VAE_RATE, weight_decay=1e-4)
    average = Average(vae)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, VAE_RATE)
        batch = to_model_range(pictures[rng.integers(len(pictures), size=VAE_BATCH)]).to(device)
        posterior = vae.encode(batch).latent_dist
        # A fixed small noise instead of the usual KL term: with it, hard-edged pictures are learnt from the first steps
        # and latents forgive small errors.
        decoded = vae.decode(posterior.mean + LATENT_NOISE * torch.randn_like(posterior.mean)).sample
        # Shapes cover a twentieth of a picture: unweighted, their hue is learnt last (green, blue and purple alike).
        ground = batch[:, :, :1, :1]
        weight = 1 + 4 * ((batch - ground).abs().amax(dim=1, keepdim=True) > 0.1)
        error = decoded - batch
        edges = sum((decoded.diff(dim=d) - batch.diff(dim=d)).abs().mean() for d in (2, 3))
        loss = (weight * (error.abs() + 2 * error.square())).mean() + 0.25 * edges
        loss = loss + 1e-3 * (posterior.logvar - 2 * math.log(LATENT_NOISE)).square().mean()
        loss = loss + 1e-4 * posterior.mean.square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        average.update(vae, step)
        if step % 100 == 99:
            log(started, f"vae {step + 1}/{steps} loss {loss.item():.4f}")
    return average.model  # type: ignore[return-value]


@torch.no_grad()
def gate_vae(vae: AutoencoderKL, pictures: np.ndarray, device: str, started: float) -> None:
    """Refuses a VAE that loses a colour: an error that mean PSNR hides and that the UNet cannot mend."""
    batch = to_model_range(pictures[:256]).to(device)
    decoded = vae.decode(vae.encode(batch).latent_dist.mean).sample
    psnr_db = 10 * math.log10(4 / functional.mse_loss(decoded.clamp(-1, 1), batch).item())
    worst, where = 0.0, ""
    for background, ground in BACKGROUNDS.items():
        for name, colour in COLOURS.items():
            scene = Scene((Thing("square", name),), "", background)
            picture = to_model_range(draw(scene, np.random.default_rng(0))[None]).to(device)
            seen = (vae.decode(vae.encode(picture).latent_dist.mean).sample[0].cpu() + 1) * 127.5
            inner = (seen[:, 28:36, 28:36].mean(dim=(1, 2)) - torch.tensor(colour)).abs().max().item()
            outer = (seen[:, :6, :6].mean(dim=(1, 2)) - torch.tensor(ground)).abs().max().item()
            if max(inner, outer) > worst:
                worst, where = max(inner, outer), scene.caption
    log(started, f"vae gate: {psnr_db:.1f} dB, worst colour off by {worst:.1f} levels ({where})")
    if psnr_db < 30 or worst > 10:
        raise SystemExit("the VAE failed its gate (30 dB, 10 levels): train it longer")


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: np.ndarray, device: str) -> Tensor:
    """Latent means, scaled to unit standard deviation; the scale is stored in the VAE's config."""
    parts = [vae.encode(to_model_range(p).to(device)).latent_dist.mean.cpu() for p in np.array_split(pictures, 200)]
    latents = torch.cat(parts)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
    return latents * vae.config["scaling_factor"]


class Reader(torch.nn.Module):
    """Reads back from a text encoder's context [B, L, E] what lies where: logits [B, 6, 12].

    Rows are the places of `PLACES`, then the background; columns the colours or backgrounds, then the shapes or none.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.places = torch.nn.Parameter(torch.randn(len(PLACES) + 1, width) * 0.02)
        self.attention = torch.nn.MultiheadAttention(width, 4, batch_first=True)
        self.classes = torch.nn.Linear(width, len(COLOURS) + len(SHAPES) + 1)

    def forward(self, context: Tensor) -> Tensor:
        queries = self.places.expand(len(context), -1, -1)
        read, _ = self.attention(queries, context, context, need_weights=False)
        logits: Tensor = self.classes(read)
        return logits


def what_lies_where(scene: Scene) -> tuple[list[int], list[int]]:
    """(colour, shape) of every place of `PLACES`, an empty one's shape being the last; then the background's."""
    places: dict[str, Thing] = {"centre": scene.things[0]}
    if scene.relation:
        first = {"left of": "left", "right of": "right", "above": "top", "below": "bottom"}[scene.relation]
        second = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}[first]
        places = {first: scene.things[0], second: scene.things[1]}
    things = [places.get(place) for place in PLACES]
    colours = [list(COLOURS).index(t.colour) if t else -1 for t in things]
    shapes = [SHAPES.index(t.shape) if t else len(SHAPES) for t in things]
    return [*colours, list(BACKGROUNDS).index(scene.background)], [*shapes, len(SHAPES)]


def train_text(text: CLIPTextModel, ids: Tensor, scenes: list[Scene], steps: int, device: str, started: float) -> None:
    """Teaches the text encoder what its captions say, as CLIP's is taught by pictures before SD is trained.

    Without it the denoiser learns colours and shapes from the loss, but for a very long time not which lies on which
    side: a causal encoder's tokens know it only where they were made to gather it.
    """
    generator = torch.Generator().manual_seed(3)
    colours, shapes = (torch.tensor(t).to(device) for t in zip(*map(what_lies_where, scenes), strict=True))
    reader = Reader(text.config.hidden_size).to(device)
    both = torch.nn.ModuleList([text, reader])
    optimizer = torch.optim.AdamW(both.parameters(), lr=TEXT_RATE, weight_decay=1e-3)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, TEXT_RATE)
        index = torch.randint(len(ids), (TEXT_BATCH,), generator=generator)
        logits = reader(text(ids[index].to(device))[0])
        by_colour, by_shape = logits.split([len(COLOURS), len(SHAPES) + 1], dim=-1)
        loss = functional.cross_entropy(by_colour.flatten(0, 1), colours[index].flatten(), ignore_index=-1)
        loss = loss + functional.cross_entropy(by_shape.flatten(0, 1), shapes[index].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        if step % 250 == 249:
            log(started, f"text {step + 1}/{steps} loss {loss.item():.4f}")


def train_denoiser(
    text: CLIPTextModel,
    unet: UNet2DConditionModel,
    latents: Tensor,
    ids: Tensor,
    empty: Tensor,
    steps: int,
    device: str,
    compiled: bool,
    started: float,
) -> tuple[CLIPTextModel, UNet2DConditionModel]:
    generator = torch.Generator().manual_seed(2)
    scheduler = make_scheduler()
    alphas = scheduler.alphas_cumprod
    both = torch.nn.ModuleList([text, unet])
    optimizer = torch.optim.AdamW(both.parameters(), lr=1e-3, weight_decay=1e-3)
    average = Average(both)
    if compiled:  # the denoiser only: the VAE's gradients came out as zeros when compiled (torch 2.13, CPU)
        text.compile()
        unet.compile()
    mean_loss = 0.0
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, 1e-3)
        index = torch.randint(len(latents), (DENOISER_BATCH,), generator=generator)
        clean, tokens = latents[index], ids[index].clone()
        tokens[torch.rand(DENOISER_BATCH, generator=generator) < EMPTY_PROMPT_SHARE] = empty
        noise = torch.randn(clean.shape, generator=generator)
        # Density grows with t: colour, shape and place are decided at high noise; the VAE forgives what is left.
        times = (1000 * torch.rand(DENOISER_BATCH, generator=generator).sqrt()).long()
        alpha = alphas[times].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        target = alpha.sqrt() * noise - (1 - alpha).sqrt() * clean  # v prediction
        context = text(tokens.to(device))[0]
        predicted = unet(noisy.to(device), times.to(device), context, return_dict=False)[0]
        loss = functional.mse_loss(predicted, target.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        average.update(both, step)
        mean_loss += (loss.item() - mean_loss) / min(step + 1, 200)
        if step % 100 == 99:
            log(started, f"denoiser {step + 1}/{steps} loss {mean_loss:.4f}")
    trained: Any = average.model
    return trained[0], trained[1]


def make_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type="v_prediction",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--compile", action="store_true", help="compile the denoiser first; needs a C++ compiler")
    parser.add_argument("--vae", type=Path, help="a VAE folder to start from")
    parser.add_argument("--vae-steps", type=int, default=VAE_STEPS, help="0 takes the VAE as it is")
    parser.add_argument("--resume", type=Path, help="a model folder whose text encoder and UNet to start from")
    parser.add_argument("--text-steps", type=int, default=TEXT_STEPS, help="0 takes the text encoder as it is")
    parser.add_argument("--denoiser-steps", type=int, default=DENOISER_STEPS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    started = time.monotonic()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    rng = np.random.default_rng(0)
    scenes, _ = all_scenes()
    single = [s for s in scenes if len(s.things) == 1]
    double = [s for s in scenes if len(s.things) == 2]
    chosen = [
        kind[rng.integers(len(kind))] for kind in (single if rng.random() < 0.25 else double for _ in range(PICTURES))
    ]
    pictures = np.stack([draw(scene, rng) for scene in chosen])
    log(started, f"drew {len(pictures)} pictures of {len({s.caption for s in chosen})} captions")

    arguments.output.mkdir(parents=True, exist_ok=True)
    tokenizer = write_tokenizer(arguments.output / "tokenizer")
    vae, text, unet = make_models(tokenizer)
    if arguments.vae:
        vae.load_state_dict(load_file(arguments.vae / "diffusion_pytorch_model.safetensors"))
    if arguments.vae_steps:
        vae = train_vae(vae.to(device), pictures, arguments.vae_steps, device, started)
        vae.save_pretrained(arguments.output / "vae")
    gate_vae(vae.to(device), pictures, device, started)
    latents = encode(vae, pictures, device)
    vae.save_pretrained(arguments.output / "vae")
    if arguments.resume:
        text.load_state_dict(load_file(arguments.resume / "text_encoder" / "model.safetensors"))
        unet.load_state_dict(load_file(arguments.resume / "unet" / "diffusion_pytorch_model.safetensors"))
    log(started, f"latents {tuple(latents.shape)}, scaling factor {vae.config['scaling_factor']}")

    def tokens(prompts: list[str]) -> Tensor:
        return tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids

    ids = tokens([s.caption for s in chosen])
    train_text(text.to(device), ids, chosen, arguments.text_steps, device, started)
    text, unet = train_denoiser(
        text.to(device),
        unet.to(device),
        latents,
        ids,
        tokens([""])[0],
        arguments.denoiser_steps,
        device,
        arguments.compile,
        started,
    )
    pipeline = StableDiffusionPipeline(
        vae, text, tokenizer, unet, make_scheduler(), None, None, requires_safety_checker=False
    )
    pipeline.to("cpu", torch.float16).save_pretrained(arguments.output, safe_serialization=True)
    log(started, f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
