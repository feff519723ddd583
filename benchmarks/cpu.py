"""Measures the numbers of the tables in README.md and docs/measurements.md on this machine and writes them as JSON.

    python benchmarks/cpu.py --output benchmarks/results/cpu.json

Needs the bundled model; builds it into a temporary store. Speed against diffusers is measured in pairs, one after the
other in the same run, so that the machine's drift hits both alike.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from toolchain.engines.machine import installed, machine
from toolchain.store.plain_json import encode

ROOT = Path(__file__).parents[1]
MODEL = ROOT / "examples" / "shapes" / "model"
RECIPE = ROOT / "recipes" / "shapes-fp32.toml"
PROMPT = "a red circle left of a blue square on a white background"
STEPS = 20
PACKAGES = ("torch", "diffusers", "transformers", "onnxscript", "numpy", "onnxruntime-gpu", "onnxruntime")


def timed(command: list[str], cwd: Path) -> float:
    started = time.perf_counter()
    subprocess.run(command, check=True, cwd=cwd, capture_output=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    return time.perf_counter() - started


def spread(seconds: list[float]) -> dict[str, float]:
    return {
        "min_s": round(min(seconds), 3),
        "median_s": round(statistics.median(seconds), 3),
        "max_s": round(max(seconds), 3),
        "runs": len(seconds),
    }


def start_to_png(bundle: Path, scratch: Path) -> dict[str, Any]:
    """Process start to PNG, this project and diffusers in turn; the first pair warms the file cache and is dropped."""
    ours = [str(Path(sys.executable).with_name("diffbuild")), "generate", str(bundle), PROMPT, "--seed", "0"]
    ours += ["--steps", str(STEPS), "--scheduler", "model", "--output", str(scratch / "ours.png")]
    theirs = [sys.executable, str(ROOT / "benchmarks" / "diffusers_generate.py"), str(MODEL), PROMPT, str(STEPS)]
    theirs += [str(scratch / "theirs.png")]
    pairs = [(timed(ours, scratch), timed(theirs, scratch)) for _ in range(8)][1:]
    ratios = [b / a for a, b in pairs]
    return {
        "diffbuild": spread([a for a, _ in pairs]),
        "diffusers": spread([b for _, b in pairs]),
        "times_faster": {"min": round(min(ratios), 2), "median": round(statistics.median(ratios), 2)},
    }


def build_times(scratch: Path) -> tuple[Path, dict[str, Any]]:
    bundle = scratch / "bundle"
    command = [str(Path(sys.executable).with_name("diffbuild")), "build", str(RECIPE), "--model", str(MODEL)]
    command += ["--output", str(bundle), "--store", str(scratch / "store")]
    first = timed(command, scratch)
    return bundle, {"first_s": round(first, 1), "no_op": spread([timed(command, scratch) for _ in range(6)][1:])}


def verified_load(bundle: Path) -> dict[str, float]:
    import toolchain

    def once() -> float:
        started = time.perf_counter()
        toolchain.load(bundle).close()
        return time.perf_counter() - started

    return spread([once() for _ in range(6)][1:])


def bucket_sizes(bundle: Path) -> dict[str, Any]:
    """Bytes per bucket of the denoiser, and bytes that its buckets share."""
    folder = bundle / "engines" / "denoiser"
    own = {d.name: sum(f.stat().st_size for f in d.iterdir()) for d in sorted(folder.iterdir()) if d.is_dir()}
    return {"shared_bytes": sum(f.stat().st_size for f in folder.iterdir() if f.is_file()), "own_bytes": own}


def parity(bundle: Path) -> dict[str, Any]:
    """Worst PSNR of two pictures against diffusers for every scheduler that can drive the model."""
    import numpy as np
    import torch
    from diffusers import StableDiffusionPipeline

    import toolchain
    from toolchain.sampler.schedulers import compatible, create, parse, reference_kwargs

    pipe = toolchain.load(bundle)
    config = pipe.bundle.settings.scheduler
    reference = StableDiffusionPipeline.from_pretrained(MODEL, dtype=torch.float32, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    prompts = [PROMPT, "a yellow triangle above a purple ring on a black background"]
    result = {}
    options = ("ddim:eta=1.0", "dpm++2m:karras", "dpm++2m:karras,sde", "euler:karras", "unipc:order=3")
    for name in ["model", *compatible(config), *options]:
        spec = parse(name)
        try:
            reference.scheduler = create(spec, config)
            ours = pipe(prompts, seed=[0, 1], steps=STEPS, guidance=5.0, scheduler=name).images
        except toolchain.DiffbuildError as error:
            result[name] = error.what
            continue
        generators = [torch.Generator().manual_seed(s) for s in (0, 1)]
        arguments: dict[str, Any] = {"generator": generators, "output_type": "np", **reference_kwargs(spec)}
        images = reference(prompts, num_inference_steps=STEPS, guidance_scale=5.0, **arguments).images
        theirs = (images * 255).round().astype(np.uint8).astype(np.float64)
        errors = [((np.asarray(a) - b) ** 2).mean() for a, b in zip(ours, theirs, strict=True)]
        result[name] = round(float(10 * np.log10(255**2 / max(*errors, 1e-12))), 1)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": {**machine(), "versions": installed(PACKAGES)}}
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        bundle, result["build"] = build_times(scratch)
        measures: dict[str, Callable[[], Any]] = {
            "start_to_png": lambda: start_to_png(bundle, scratch),
            "verified_load": lambda: verified_load(bundle),
            "denoiser_sizes": lambda: bucket_sizes(bundle),
            "psnr_db": lambda: parity(bundle),
        }
        for key, measure in measures.items():
            print(f"{key} ...", file=sys.stderr, flush=True)
            result[key] = measure()
    arguments.output.write_text(encode(result) + "\n")
    print(encode(result))


if __name__ == "__main__":
    main()
