"""What a machine with an NVIDIA GPU makes of the bundled model and, with --sdxl, of SDXL at full size.

    python benchmarks/gpu.py --output gpu-report.json
    python benchmarks/gpu.py --output gpu-report.json --sdxl --backends onnxruntime_cuda

Builds with each GPU backend that can run here, checks the bundle against diffusers, draws a thousand pictures while
what is held is watched, and measures in one run with diffusers in eager mode and under torch.compile. SDXL's weights
are seeded random numbers. A part that fails is written down with its error, and the others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import toolchain
from toolchain.api import check_bundle
from toolchain.bench.run import bench, workload
from toolchain.bundle import read_bundle
from toolchain.doctor import examine
from toolchain.engines import BACKENDS
from toolchain.engines.cuda import free_memory_bytes
from toolchain.recipe import Bucket, ComponentRecipe, Recipe, load_recipe
from toolchain.trace.record import trace

ROOT = Path(__file__).parents[1]
SHAPES = ROOT / "examples" / "shapes" / "model"
PROMPT = "a red circle left of a blue square on a white background"
GPU_BACKENDS = ("tensorrt", "onnxruntime_cuda")


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # whatever it is, the report is to tell it
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def shapes_recipe(backend: str) -> Recipe:
    """In float32 without TF32, whose rounding the limits of a float32 check do not forgive."""
    recipe = load_recipe(ROOT / "recipes" / "shapes-fp32.toml")
    exact = {name: dataclasses.replace(getattr(recipe, name), tf32=False) for name in GPU_BACKENDS}
    return dataclasses.replace(recipe, name=f"shapes-{backend}", backend=backend, **exact)


def sdxl_recipe(backend: str) -> Recipe:
    recipe = load_recipe(ROOT / "recipes" / "sdxl-fp16-tensorrt.toml")
    half, wide = ComponentRecipe(dtype="float16"), ComponentRecipe()
    components = {"text_encoder": half, "text_encoder_2": half, "denoiser": half, "vae_decoder": wide}
    bucket = (Bucket(1, 1024, 1024),)
    return dataclasses.replace(
        recipe, name=f"sdxl-{backend}", backend=backend, buckets=bucket, without=("vae_encoder",), components=components
    )


def steadiness(bundle: Path, rounds: int) -> dict[str, Any]:
    """What is held before and after many calls with changing prompts, steps, schedulers and buckets, and how often one
    waits. `free_bytes` is the GPU's own word, for what libraries allocate: nobody else may use it meanwhile."""
    pipe = toolchain.load(bundle)
    counters = pipe._memory.counters  # type: ignore[attr-defined]
    buckets, schedulers = pipe.bundle.buckets, pipe.bundle.recipe.sampling.schedulers

    def draw(index: int) -> None:
        bucket = buckets[index % len(buckets)]
        prompts = [f"{PROMPT} {(index + i) % 300}" for i in range(bucket.batch)]
        scheduler = schedulers[index % len(schedulers)]
        size = (bucket.height, bucket.width)
        pipe(prompts, seed=index, steps=4 + index % 3, scheduler=scheduler, size=size)

    for index in range(300):
        draw(index)
    before, free_before = dataclasses.replace(counters), free_memory_bytes()
    started = time.perf_counter()
    for index in range(rounds):
        draw(index)
    seconds = time.perf_counter() - started
    after, free_after = dataclasses.replace(counters), free_memory_bytes()
    pipe.close()
    return {
        "held_bytes": [c.device_bytes + c.pinned_bytes for c in (before, after)],
        "free_bytes": [free_before, free_after],
        "captures": [before.captures, after.captures],
        "synchronisations_per_picture": (after.synchronisations - before.synchronisations) / rounds,
        "ms_per_picture": seconds / rounds * 1e3,
    }


def gaps(bundle: Path) -> dict[str, float]:
    """How much of the loop the GPU waits for the next step, by events around each launch of the denoiser."""
    recorded = trace(read_bundle(bundle), {"prompt": PROMPT, "seed": 0})
    loop_ms = sum(span.ms for span in recorded.of("stage") if span.name == "denoise")
    steps_ms = sum(span.ms for span in recorded.of("engine") if span.name.startswith("denoiser"))
    return {"loop_ms": loop_ms, "steps_ms": steps_ms, "idle_share": 1 - steps_ms / loop_ms}


def built(recipe: Recipe, model: Path, scratch: Path) -> tuple[Path, float]:
    """The bundle and the seconds that its build took."""
    started = time.perf_counter()
    toolchain.build(recipe, str(model), scratch / recipe.name, store=scratch / "store")
    return scratch / recipe.name, time.perf_counter() - started


def shapes(backend: str, scratch: Path, against: tuple[str, ...], repeats: int, rounds: int) -> dict[str, Any]:
    bundle, seconds = built(shapes_recipe(backend), SHAPES, scratch)
    return {
        "build_s": seconds,
        "device": dict(read_bundle(bundle).device),
        "check": attempt(lambda: check_bundle(bundle, str(SHAPES)).to_json()),
        "steadiness": attempt(lambda: steadiness(bundle, rounds)),
        "bench": attempt(lambda: measured(bundle, SHAPES, against, repeats)),
        "gaps": attempt(lambda: gaps(bundle)),
    }


def sdxl(backend: str, model: Path, scratch: Path, against: tuple[str, ...], repeats: int) -> dict[str, Any]:
    bundle, seconds = built(sdxl_recipe(backend), model, scratch)
    return {
        "build_s": seconds,
        "bench": attempt(lambda: measured(bundle, model, against, repeats)),
        "gaps": attempt(lambda: gaps(bundle)),
    }


def measured(bundle: Path, model: Path, against: tuple[str, ...], repeats: int) -> dict[str, Any]:
    opened = read_bundle(bundle)
    work = workload(opened, PROMPT, 1, None, None)
    return bench(opened, work, against=against, model=model, repeats=repeats, progress=print).to_json()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sdxl", action="store_true", help="also SDXL at full size, with random weights")
    parser.add_argument("--backends", nargs="*", default=list(GPU_BACKENDS), choices=GPU_BACKENDS)
    parser.add_argument("--against", nargs="*", default=["diffusers", "compile"])
    parser.add_argument("--repeats", type=int, default=5, help="of the bench")
    parser.add_argument("--rounds", type=int, default=1000, help="pictures while memory is watched")
    arguments = parser.parse_args()
    against = tuple(arguments.against)
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        result: dict[str, Any] = {"doctor": examine(scratch / "store")}
        model = scratch / "sdxl"
        if arguments.sdxl:
            from real_size_numerics import write_model

            result["sdxl_model"] = attempt(lambda: write_model("sdxl", model))
        for backend in arguments.backends:
            reason = BACKENDS[backend].available()
            if reason is not None:
                result[backend] = {"skipped": reason}
                continue
            small = attempt(lambda b=backend: shapes(b, scratch, against, arguments.repeats, arguments.rounds))
            result[backend] = {"shapes": small}
            if arguments.sdxl:
                found = attempt(lambda b=backend: sdxl(b, model, scratch, against, arguments.repeats))
                result[backend]["sdxl"] = found
            arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    main()
