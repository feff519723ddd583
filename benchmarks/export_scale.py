"""Exports every component of the published models from their configs and writes seconds, memory and sizes as JSON.

    python benchmarks/export_scale.py --output benchmarks/results/export_scale.json
    python benchmarks/export_scale.py --model sdxl --component denoiser --output sdxl.json

The configs stand below: no weights are read and nothing is downloaded. Each export runs in a process of its own, whose
peak memory is that of the export; precision, guidance and the shape (the first bucket) are those of the model's recipe.
`seconds` are the clock's and grow on a busy machine; `cpu_seconds` are what the export used itself, and `load` is the
machine's load average before it. Results of other models and components that are in the output already are
kept.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.engines.machine import installed, machine

ROOT = Path(__file__).parents[1]
PACKAGES = ("torch", "diffusers", "transformers", "onnxscript", "onnx-ir")
Config = dict[str, Any]


def clip(*, width: int, layers: int, activation: str, projection: int) -> Config:
    return {
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": activation,
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "layer_norm_eps": 1e-05,
        "max_position_embeddings": 77,
        "model_type": "clip_text_model",
        "num_attention_heads": width // 64,
        "num_hidden_layers": layers,
        "pad_token_id": 1,
        "projection_dim": projection,
        "vocab_size": 49408,
    }


CLIP_L = clip(width=768, layers=12, activation="quick_gelu", projection=768)
CLIP_BIG_G = clip(width=1280, layers=32, activation="gelu", projection=1280)
T5_XXL: Config = {
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dense_act_fn": "gelu_new",
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "is_encoder_decoder": True,
    "is_gated_act": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "pad_token_id": 0,
    "relative_attention_max_distance": 128,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "vocab_size": 32128,
}


def vae(channels: int, sample_size: int, **own: Any) -> Config:
    return {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "in_channels": 3,
        "latent_channels": channels,
        "layers_per_block": 2,
        "norm_num_groups": 32,
        "out_channels": 3,
        "sample_size": sample_size,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        **own,
    }


def unet(**own: Any) -> Config:
    return {
        "_class_name": "UNet2DConditionModel",
        "act_fn": "silu",
        "center_input_sample": False,
        "downsample_padding": 1,
        "flip_sin_to_cos": True,
        "freq_shift": 0,
        "in_channels": 4,
        "layers_per_block": 2,
        "mid_block_scale_factor": 1,
        "norm_eps": 1e-05,
        "norm_num_groups": 32,
        "out_channels": 4,
        **own,
    }


BETAS: Config = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}
SD15: dict[str, Config] = {
    "model_index.json": {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "PNDMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {"_class_name": "PNDMScheduler", **BETAS},
    "text_encoder/config.json": CLIP_L,
    "unet/config.json": unet(
        attention_head_dim=8,
        block_out_channels=[320, 640, 1280, 1280],
        cross_attention_dim=768,
        down_block_types=[*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
        sample_size=64,
        up_block_types=["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
    ),
    "vae/config.json": vae(4, 512),
}
SDXL: dict[str, Config] = {
    "model_index.json": {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": True,
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "EulerDiscreteScheduler",
        **BETAS,
        "interpolation_type": "linear",
        "sample_max_value": 1.0,
        "timestep_spacing": "leading",
        "use_karras_sigmas": False,
    },
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": CLIP_BIG_G,
    "unet/config.json": unet(
        addition_embed_type="text_time",
        addition_embed_type_num_heads=64,
        addition_time_embed_dim=256,
        attention_head_dim=[5, 10, 20],
        block_out_channels=[320, 640, 1280],
        cross_attention_dim=2048,
        down_block_types=["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
        projection_class_embeddings_input_dim=2816,
        sample_size=128,
        transformer_layers_per_block=[1, 2, 10],
        up_block_types=["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
        use_linear_projection=True,
    ),
    "vae/config.json": vae(4, 1024, force_upcast=True, scaling_factor=0.13025),
}
SD35_MEDIUM: dict[str, Config] = {
    "model_index.json": {
        "_class_name": "StableDiffusion3Pipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "text_encoder_3": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "tokenizer_3": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "SD3Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "num_train_timesteps": 1000,
        "shift": 3.0,
    },
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": CLIP_BIG_G,
    "text_encoder_3/config.json": T5_XXL,
    "transformer/config.json": {
        "_class_name": "SD3Transformer2DModel",
        "attention_head_dim": 64,
        "caption_projection_dim": 1536,
        "dual_attention_layers": list(range(13)),
        "in_channels": 16,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 24,
        "out_channels": 16,
        "patch_size": 2,
        "pooled_projection_dim": 2048,
        "pos_embed_max_size": 384,
        "qk_norm": "rms_norm",
        "sample_size": 128,
    },
    "vae/config.json": vae(
        16,
        1024,
        force_upcast=True,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_post_quant_conv=False,
        use_quant_conv=False,
    ),
}
FLUX_DEV: dict[str, Config] = {
    "model_index.json": {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "T5EncoderModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "T5TokenizerFast"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    },
    "scheduler/scheduler_config.json": {
        "_class_name": "FlowMatchEulerDiscreteScheduler",
        "base_image_seq_len": 256,
        "base_shift": 0.5,
        "max_image_seq_len": 4096,
        "max_shift": 1.15,
        "num_train_timesteps": 1000,
        "shift": 3.0,
        "use_dynamic_shifting": True,
    },
    "text_encoder/config.json": CLIP_L,
    "text_encoder_2/config.json": T5_XXL,
    "transformer/config.json": {
        "_class_name": "FluxTransformer2DModel",
        "attention_head_dim": 128,
        "axes_dims_rope": [16, 56, 56],
        "guidance_embeds": True,
        "in_channels": 64,
        "joint_attention_dim": 4096,
        "num_attention_heads": 24,
        "num_layers": 19,
        "num_single_layers": 38,
        "patch_size": 1,
        "pooled_projection_dim": 768,
    },
    "vae/config.json": vae(
        16,
        1024,
        force_upcast=True,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_post_quant_conv=False,
        use_quant_conv=False,
    ),
}


@dataclass(frozen=True)
class Published:
    """A model as published: its config files and the recipe that it is exported with."""

    files: dict[str, Config]
    recipe: str

    def write(self, folder: Path) -> None:
        for name, content in self.files.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(json.dumps(content))


PUBLISHED = {
    "sd15": Published(SD15, "sd15-fp16"),
    "sdxl": Published(SDXL, "sdxl-fp16"),
    "sd35-medium": Published(SD35_MEDIUM, "sd35-medium-fp16"),
    "flux-dev": Published(FLUX_DEV, "flux1-dev-bf16"),
}
COMPONENTS = ("text_encoder", "text_encoder_2", "text_encoder_3", "denoiser", "vae_decoder", "vae_encoder")


def export(folder: Path, recipe_path: Path, name: str) -> dict[str, Any]:
    """One component, in this process: its measurements."""
    import math

    import onnx_ir as ir

    from toolchain.export.capture import capture
    from toolchain.models.hub import resolve_model
    from toolchain.models.registry import family_of
    from toolchain.recipe import load_recipe

    recipe, source = load_recipe(recipe_path), resolve_model(str(folder))
    bucket = recipe.buckets[0]
    component = family_of(source, recipe).component(name)
    started, started_cpu = time.perf_counter(), time.process_time()
    graph = capture(component, source, recipe, bucket)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - started_cpu
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    path = folder / f"{name}.onnx"
    ir.save(graph, path)
    values = (v.const_value for v in graph.graph.initializers.values())
    weights = [w for w in values if isinstance(w, ir.ExternalTensor)]
    return {
        "bucket": str(bucket),
        "dtype": recipe.component(name).dtype,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
        "peak_gb": round(peak_kib * 1024 / 1e9, 2),
        "nodes": len(list(graph.graph)),
        "graph_mb": round(path.stat().st_size / 1e6, 2),
        "parameters": sum(math.prod(int(d) for d in w.shape) for w in weights),
    }


def components_of(model: str) -> list[str]:
    """What a model has, in the order in which a picture passes through it."""
    files = PUBLISHED[model].files
    return [name for name in COMPONENTS if not name.startswith("text_encoder") or f"{name}/config.json" in files]


def measure(model: str, component: str) -> dict[str, Any]:
    """A process of its own for each export. This one imports nothing large: a child's peak begins at its parent's."""
    recipe = ROOT / "recipes" / f"{PUBLISHED[model].recipe}.toml"
    with tempfile.TemporaryDirectory() as name:
        PUBLISHED[model].write(Path(name))
        command = [sys.executable, __file__, "--export", name, str(recipe), component]
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        load = round(os.getloadavg()[0], 1)
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        seconds = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(f"{model} {component}:\n{done.stderr[-2000:]}")
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**result, "process_seconds": round(seconds, 1), "load": load}


def measured_on() -> dict[str, Any]:
    return {**machine(), "threads": os.environ.get("OMP_NUM_THREADS", "default"), "versions": installed(PACKAGES)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--model", choices=PUBLISHED, action="append", help="one or more; all where none is given")
    parser.add_argument("--component", choices=COMPONENTS, action="append", help="one or more; all that the model has")
    parser.add_argument("--export", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.export:
        folder, recipe, component = arguments.export
        print(json.dumps(export(Path(folder), Path(recipe), component)))
        return
    if arguments.output is None:
        parser.error("--output is required")
    known = json.loads(arguments.output.read_text())["models"] if arguments.output.is_file() else {}
    for model in arguments.model or PUBLISHED:
        for component in components_of(model):
            if arguments.component and component not in arguments.component:
                continue
            print(f"{model} {component} ...", file=sys.stderr, flush=True)
            known.setdefault(model, {})[component] = measure(model, component)
            text = json.dumps({"machine": measured_on(), "models": known}, indent=1)
            arguments.output.write_text(text + "\n")
            print(json.dumps(known[model][component]), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
