"""Speed of a picture against diffusers, torch.compile and OpenVINO, on SD 1.5 at half width and on `shapes`.

    python benchmarks/speed.py --output benchmarks/results/speed.json

SD 1.5 at half width has seeded random weights (220 million parameters in its UNet): its pictures are noise, its work is
real. All contenders draw in turn in one run of `diffbuild bench`, in float32. A second run of ours alone shows how much
two runs of the same thing differ.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toolchain.bench.run import bench
from toolchain.bench.workload import workload
from toolchain.bundle.bundle import read_bundle
from toolchain.engines.machine import machine
from toolchain.recipe import Bucket, Check, Recipe, Sampling, load_recipe
from toolchain.store.plain_json import encode

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes" / "model"
PROMPT = "a red circle left of a blue square on a white background"


HALF, WHOLE = (160, 320, 640, 640), (320, 640, 1280, 1280)
"""Widths of the UNet's levels: half of SD 1.5's, and its own."""


def write_model(folder: Path, widths: tuple[int, ...] = HALF) -> int:
    """SD 1.5 with these widths of its UNet; the text encoder and the VAE are its own. Returns the UNet's size."""
    import torch
    from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    torch.manual_seed(0)
    tokenizer = CLIPTokenizer.from_pretrained(SHAPES / "tokenizer", model_max_length=77)
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=49408,
            hidden_size=768,
            intermediate_size=3072,
            num_hidden_layers=12,
            num_attention_heads=12,
            projection_dim=768,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=32, cross_attention_dim=768, attention_head_dim=8, block_out_channels=widths
    )
    vae = AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
        sample_size=256,
    )
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )
    pipeline = StableDiffusionPipeline(vae, text, tokenizer, unet, scheduler, None, None, requires_safety_checker=False)
    pipeline.save_pretrained(folder, safe_serialization=True)
    return sum(p.numel() for p in unet.parameters())


def half_width_recipe() -> Recipe:
    return Recipe(
        name="sd15-half-width",
        family="sd",
        buckets=(Bucket(1, 256, 256),),
        without=("vae_encoder",),
        sampling=Sampling(scheduler="euler", steps=10, guidance=7.5, schedulers=("euler",), step_counts=(10,)),
        check=Check(prompts=(PROMPT,)),
    )


def measure(recipe: Recipe, model: Path, scratch: Path, against: tuple[str, ...], repeats: int) -> dict[str, Any]:
    import toolchain

    toolchain.build(recipe, str(model), scratch / recipe.name, store=scratch / "store")
    bundle = read_bundle(scratch / recipe.name)
    work = workload(bundle, PROMPT, 1, None, None)
    compared = bench(bundle, work, against=against, model=model, repeats=repeats, progress=print).to_json()
    again = bench(bundle, work, repeats=repeats, progress=print)
    medians = [compared["contenders"]["diffbuild"]["total"]["median"], again.contenders["diffbuild"].total.median]
    del compared["bundle"]  # a folder that is gone
    compared["own_noise"] = {"medians_ms": medians, "share": max(medians) / min(medians) - 1}
    return compared


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--against", nargs="*", default=["diffusers", "compile", "openvino"])
    arguments = parser.parse_args()
    against = tuple(name for name in arguments.against if name != "openvino" or find_spec("openvino"))
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        half = scratch / "model"
        parameters = write_model(half)
        found = measure(half_width_recipe(), half, scratch, against, arguments.repeats)
        result["sd15_half_width"] = {"unet_parameters": parameters, **found}
        shapes = load_recipe(ROOT / "recipes" / "shapes-fp32.toml")
        result["shapes"] = measure(shapes, SHAPES, scratch, against, arguments.repeats)
        shutil.rmtree(half)
    for name in ("sd15_half_width", "shapes"):
        found = result[name]
        ratios = {other: round(statistics.median(r["rounds"]), 2) for other, r in found["ratios"].items()}
        print(f"{name}: times as long as diffbuild: {ratios}; own noise {found['own_noise']['share']:.1%}")
    arguments.output.write_text(encode(result) + "\n")


if __name__ == "__main__":
    main()
