"""OpenVINO's engines against ONNX Runtime's and against diffusers, on a CPU that computes in bfloat16.

    python benchmarks/openvino_speed.py --output benchmarks/results/openvino.json

1. SD 1.5 at half width (`benchmarks/speed.py`), 256x256, ten steps, prompt to picture. All draw in turn in one run,
   each in a process of its own.
2. SD 1.5 at its real size: one step at 512x512 in bfloat16, and torch's UNet in float32, in turn in one process.
3. `shapes`: `diffbuild generate` from the process's start to the PNG, with either backend in turn.

Weights of 1 and 2 are random and seeded: the pictures are noise, the work is real.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from cpu import timed
from int8_step import recipe_in_int8
from speed import PROMPT, ROOT, SHAPES, WHOLE, half_width_recipe, write_model

import toolchain
from toolchain.bench.contender import Contender
from toolchain.bench.workload import workload
from toolchain.bundle.bundle import Bundle
from toolchain.engines.buffers import HostMemory
from toolchain.engines.cpu import physical_cores
from toolchain.engines.machine import installed, machine
from toolchain.engines.runners import runner_of
from toolchain.recipe import Bucket, ComponentRecipe, Recipe, load_recipe
from toolchain.runtime.engines import BoundEngine, open_engine
from toolchain.store.plain_json import encode

PACKAGES = ("diffbuild", "openvino", "onnxruntime", "torch", "diffusers", "numpy")
EVERY = ("text_encoder", "denoiser", "vae_decoder")


def on_openvino(recipe: Recipe, name: str, dtype: str) -> Recipe:
    """The same recipe with OpenVINO, every component in this type."""
    components = {n: replace(recipe.component(n), dtype=dtype) for n in EVERY}
    return replace(recipe, name=name, backend="openvino", components=components)


def recipes() -> dict[str, Recipe]:
    """ "openvino int8" has the denoiser and the VAE's decoder in int8, and bfloat16 around them."""
    plain = half_width_recipe()
    small = recipe_in_int8(plain, smoothing=0.5)
    small = replace(small, components=dict.fromkeys(("denoiser", "vae_decoder"), small.component("denoiser")))
    return {
        "onnxruntime float32": plain,
        "openvino float32": on_openvino(plain, "openvino-float32", "float32"),
        "openvino bfloat16": on_openvino(plain, "openvino-bfloat16", "bfloat16"),
        "openvino int8": on_openvino(small, "openvino-int8", "bfloat16"),
    }


def pictures(bundles: Mapping[str, Bundle], model: Path, scratch: Path, repeats: int) -> dict[str, Any]:
    """Milliseconds of each stage, and the ratios to the two of diffusers, round by round."""
    work = workload(bundles["onnxruntime float32"], PROMPT, 1, None, None)
    started = {name: ("diffbuild", bundle) for name, bundle in bundles.items()}
    started["diffusers float32"] = ("diffusers", bundles["openvino float32"])
    started["diffusers bfloat16"] = ("diffusers", bundles["openvino bfloat16"])
    contenders: dict[str, Contender] = {}
    try:
        for name, (kind, bundle) in started.items():
            folder = scratch / name.replace(" ", "-")
            folder.mkdir()
            contenders[name] = Contender(kind, bundle.path, model, work, folder)
        rounds = []
        for number in range(repeats):
            print(f"round {number + 1} of {repeats}", flush=True)
            rounds.append({name: contender.draw(work) for name, contender in contenders.items()})
        ends = {name: contender.finish() for name, contender in contenders.items()}
    finally:
        for contender in contenders.values():
            contender.close()
    return {
        "median_ms": {n: {s: statistics.median(r[n][s] for r in rounds) for s in rounds[0][n]} for n in contenders},
        "total_ms": {n: [r[n]["total_ms"] for r in rounds] for n in contenders},
        "ratios": {
            f"{other} / {name}": [r[other]["total_ms"] / r[name]["total_ms"] for r in rounds]
            for other in ("diffusers float32", "diffusers bfloat16", "onnxruntime float32")
            for name in bundles
            if name != other
        },
        "peak_mb": {name: end["peak_mb"] for name, end in ends.items()},
        "start_ms": {name: contender.start for name, contender in contenders.items()},
    }


def torch_step(model: Path, latents: tuple[int, ...], context: np.ndarray) -> Callable[[], None]:
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(physical_cores())
    unet = UNet2DConditionModel.from_pretrained(model / "unet").eval()
    states, text = torch.zeros(2, *latents), torch.from_numpy(context)

    def step() -> None:
        with torch.inference_mode():
            unet(states, 500, text)

    return step


def real_step(scratch: Path, repeats: int) -> dict[str, Any]:
    """Seconds of one step, both rows of guidance."""
    model, bucket = scratch / "real", Bucket(1, 512, 512)
    parameters = write_model(model, WHOLE)
    recipe = replace(on_openvino(half_width_recipe(), "real", "bfloat16"), buckets=(bucket,))
    bundle = toolchain.build(recipe, str(model), scratch / "real-bundle", store=scratch / "store")
    engine = BoundEngine(open_engine(bundle, runner_of("openvino"), "denoiser", bucket, HostMemory()), HostMemory())
    context = np.random.default_rng(0).standard_normal(engine.inputs["context"].shape).astype(np.float32)
    eager = torch_step(model, (4, 64, 64), context)
    seconds: dict[str, list[float]] = {"openvino bfloat16": [], "torch float32": []}
    for _ in range(repeats + 1):
        for name, run in (("openvino bfloat16", lambda: engine({"context": context})), ("torch float32", eager)):
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    ours, theirs = (times[1:] for times in seconds.values())  # the first run of either warms up
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    return {"unet_parameters": parameters, "seconds": {n: t[1:] for n, t in seconds.items()}, "ratios": ratios}


def start_to_png(scratch: Path, repeats: int) -> dict[str, Any]:
    """Seconds of `diffbuild generate` on `shapes`; the first of each warms the file cache."""
    plain = load_recipe(ROOT / "recipes" / "shapes-fp32.toml")
    every = (*EVERY, "vae_encoder")
    short = {name: ComponentRecipe(dtype="bfloat16") for name in every}
    variants = {
        "onnxruntime float32": plain,
        "openvino float32": replace(plain, name="shapes-openvino", backend="openvino"),
        "openvino bfloat16": replace(plain, name="shapes-bfloat16", backend="openvino", components=short),
    }
    commands = {}
    for name, recipe in variants.items():
        bundle = toolchain.build(recipe, str(SHAPES), scratch / recipe.name, store=scratch / "store")
        command = [str(Path(sys.executable).with_name("diffbuild")), "generate", str(bundle.path), PROMPT]
        commands[name] = [*command, "--seed", "0", "--output", str(scratch / f"{recipe.name}.png")]
    rounds = [{name: timed(command, scratch) for name, command in commands.items()} for _ in range(repeats + 1)][1:]
    return {
        "seconds": {name: [r[name] for r in rounds] for name in commands},
        "ratios": {name: [r[name] / r["onnxruntime float32"] for r in rounds] for name in commands},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--only", choices=["pictures", "real", "start"], help="one part; the others keep their results")
    parser.add_argument("--scratch", type=Path, help="a folder that keeps what is built; a temporary one without it")
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    if arguments.only and arguments.output.exists():
        import json

        result = json.loads(arguments.output.read_text())
    result |= {"machine": machine(), "versions": installed(PACKAGES)}
    with tempfile.TemporaryDirectory() as temporary:
        scratch = arguments.scratch or Path(temporary)
        if arguments.only in (None, "pictures"):
            model = scratch / "half"
            write_model(model)
            bundles = {
                name: toolchain.build(r, str(model), scratch / r.name, store=scratch / "store", gate=False)
                for name, r in recipes().items()
            }
            with tempfile.TemporaryDirectory() as folder:
                result["sd15_half_width"] = pictures(bundles, model, Path(folder), arguments.repeats)
        if arguments.only in (None, "real"):
            result["sd15_real_step"] = real_step(scratch, arguments.repeats)
        if arguments.only in (None, "start"):
            result["shapes_start_to_png"] = start_to_png(scratch, 2 * arguments.repeats)
    for found in (result[key] for key in ("sd15_half_width", "sd15_real_step", "shapes_start_to_png") if key in result):
        ratios = found["ratios"]
        for name, values in ratios.items() if isinstance(ratios, dict) else [("torch / openvino", ratios)]:
            print(f"{name}: median {statistics.median(values):.2f}, {min(values):.2f} to {max(values):.2f}")
    arguments.output.write_text(encode(result) + "\n")


if __name__ == "__main__":
    main()
