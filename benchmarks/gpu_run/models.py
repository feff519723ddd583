"""Whole models on every GPU backend that can run here: `shapes`, then SD 1.5 and SDXL at full size with random weights.

What is built lies in the scratch folder, and a later run goes on from there: models and graphs need no backend and can
be made before its library has come.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import shutil
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import toolchain
from benchmarks.export_scale import PUBLISHED
from benchmarks.gpu_run.record import ROOT, Record
from toolchain.api import check_bundle, export_graphs
from toolchain.bench.run import bench
from toolchain.bench.workload import workload
from toolchain.bundle.bundle import read_bundle
from toolchain.cuda.driver import free_memory_bytes
from toolchain.engines.runners import runner_of
from toolchain.recipe import Bucket, ComponentRecipe, Recipe, load_recipe
from toolchain.trace.record import trace

SHAPES = ROOT / "examples" / "shapes" / "model"
PROMPT = "a red circle left of a blue square on a white background"
GPU_BACKENDS = ("onnxruntime_cuda", "tensorrt")
OTHERS = ("diffusers", "compile")
PICTURES = 50
REPEATS = 5
SIDES = {"sd15": 512, "sdxl": 1024}


def scratch() -> Path:
    return Path(os.environ["DIFFBUILD_GPU_RUN"]) / "scratch"


def shapes(record: Record) -> None:
    for backend in GPU_BACKENDS:
        measure_backend(record, shapes_recipe(backend), SHAPES, scratch(), others=OTHERS, check=True)


def sd15(record: Record) -> None:
    real_size(record, "sd15")


def sdxl(record: Record) -> None:
    real_size(record, "sdxl")


def real_size(record: Record, name: str) -> None:
    """The model and its graphs first: they serve every backend."""
    model = scratch() / name / "model"
    recipes = [real_recipe(name, backend) for backend in GPU_BACKENDS]
    if not record.stage("model", lambda: write_model(name, model)):
        return
    graphs = partial(export_graphs, recipes[0], str(model), model.parent / "graphs", store=scratch() / "store")
    record.stage("graphs", lambda: timed(graphs)[1])
    for recipe in recipes:
        measure_backend(record, recipe, model, scratch(), others=OTHERS, check=False)


def shapes_recipe(backend: str) -> Recipe:
    """In float32 without TF32, whose rounding the limits of a float32 check do not forgive."""
    recipe = load_recipe(ROOT / "recipes" / "shapes-fp32.toml")
    exact = {name: dataclasses.replace(getattr(recipe, name), tf32=False) for name in GPU_BACKENDS}
    return dataclasses.replace(recipe, name=f"shapes-{backend}", backend=backend, **exact)


def real_recipe(name: str, backend: str) -> Recipe:
    """All in float16 but the VAE, one bucket."""
    recipe = load_recipe(ROOT / "recipes" / f"{name}-fp16-tensorrt.toml")
    half = ComponentRecipe(dtype="float16")
    folders = [f for f in PUBLISHED[name].files["model_index.json"] if f.startswith("text_encoder")]
    return dataclasses.replace(
        recipe,
        name=f"{name}-{backend}",
        backend=backend,
        buckets=(Bucket(1, SIDES[name], SIDES[name]),),
        without=("vae_encoder",),
        components={**dict.fromkeys((*folders, "denoiser"), half), "vae_decoder": ComponentRecipe()},
    )


def write_model(name: str, folder: Path) -> dict[str, Any]:
    """A diffusers folder with random weights in float16, as torch initialises them, made on the GPU where there is one.

    What was finished before is left as it is.
    """
    import diffusers
    import torch
    import transformers

    done = folder / "written"
    if done.exists():
        return {"kept": True}
    files = PUBLISHED[name].files
    PUBLISHED[name].write(folder)
    torch.manual_seed(0)
    parameters = 0
    started = time.perf_counter()
    for part, (library, cls) in ((k, v) for k, v in files["model_index.json"].items() if not k.startswith("_")):
        if part.startswith("tokenizer"):
            (folder / part).mkdir(exist_ok=True)
            for file in ("vocab.json", "merges.txt"):
                shutil.copy(SHAPES / "tokenizer" / file, folder / part)
        config = files.get(f"{part}/config.json")
        if config is None:
            continue
        kind = getattr({"diffusers": diffusers, "transformers": transformers}[library], cls)
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            module = kind.from_config(config) if library == "diffusers" else kind(kind.config_class(**config))
        module.to(torch.float16).save_pretrained(folder / part)
        parameters += sum(p.numel() for p in module.parameters())
        del module
    done.touch()
    return {"parameters": parameters, "seconds": round(time.perf_counter() - started, 1)}


def measure_backend(
    record: Record, recipe: Recipe, model: Path, place: Path, *, others: tuple[str, ...], check: bool
) -> None:
    """Builds a bundle and records what it does, in order of worth."""
    backend = recipe.backend
    reason = runner_of(backend).available()
    if reason is not None:
        record(backend, {"skipped": reason})
        return
    bundle = place / recipe.name

    def build() -> dict[str, Any]:
        made, took = timed(partial(toolchain.build, recipe, str(model), bundle, store=place / "store"))
        return {"device": dict(made.device), **took}

    if not record.stage(f"{backend}.build", build):
        return
    stages: dict[str, Callable[[], Any]] = {
        **({"check": lambda: check_bundle(bundle, str(model)).to_json()} if check else {}),
        "steadiness": lambda: steadiness(bundle, PICTURES if check else REPEATS),
        "gaps": lambda: gaps(bundle),
        "bench": lambda: measured(bundle, model, ()),
        **{name: partial(measured, bundle, model, (name,)) for name in others},
    }
    for name, work in stages.items():
        record.stage(f"{backend}.{name}", work)


def timed(work: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    started = time.perf_counter()
    return work(), {"seconds": round(time.perf_counter() - started, 1)}


def steadiness(bundle: Path, pictures: int) -> dict[str, Any]:
    """What is held before and after many pictures in changing buckets, steps and schedulers, whether a seed always
    draws the same bytes, and how often one waits. `free_bytes` is the GPU's own word, for what libraries allocate:
    nobody else may use it meanwhile."""
    pipe: Any = toolchain.load(bundle)
    counters = pipe._memory.counters
    buckets, schedulers = pipe.bundle.buckets, pipe.bundle.recipe.sampling.schedulers
    kinds = len(buckets) * len(schedulers)
    digests: dict[int, set[str]] = {}

    def draw(kind: int) -> None:
        bucket = buckets[kind % len(buckets)]
        result = pipe(
            [f"{PROMPT} {i}" for i in range(bucket.batch)],
            seed=kind,
            steps=4 + kind % 3,
            scheduler=schedulers[kind // len(buckets)],
            size=(bucket.height, bucket.width),
        )
        pixels = b"".join(image.tobytes() for image in result.images)
        digests.setdefault(kind, set()).add(hashlib.sha256(pixels).hexdigest())

    for kind in range(kinds):
        draw(kind)
    before, free_before = dataclasses.replace(counters), free_memory_bytes()
    started = time.perf_counter()
    for index in range(pictures):
        draw(index % kinds)
    seconds = time.perf_counter() - started
    after, free_after = dataclasses.replace(counters), free_memory_bytes()
    pipe.close()
    return {
        "pictures": pictures,
        "same_seed_same_bytes": all(len(found) == 1 for found in digests.values()),
        "different_pictures": len(set.union(*digests.values())),
        "kinds": kinds,
        "held_bytes": [c.device_bytes + c.pinned_bytes for c in (before, after)],
        "free_bytes": [free_before, free_after],
        "captures": [before.captures, after.captures],
        "synchronisations_per_picture": (after.synchronisations - before.synchronisations) / pictures,
        "ms_per_picture": seconds / pictures * 1e3,
    }


def gaps(bundle: Path) -> dict[str, float]:
    """How much of the loop the GPU waits for the next step, by events around each launch of the denoiser."""
    recorded = trace(read_bundle(bundle), {"prompt": PROMPT, "seed": 0})
    loop_ms = sum(span.ms for span in recorded.of("stage") if span.name == "denoise")
    steps_ms = sum(span.ms for span in recorded.of("engine") if span.name.startswith("denoiser"))
    return {"loop_ms": loop_ms, "steps_ms": steps_ms, "idle_share": 1 - steps_ms / loop_ms}


def measured(bundle: Path, model: Path, against: tuple[str, ...]) -> dict[str, Any]:
    """One run for each contender: of two in one run, the first would be lost where the second takes too long."""
    opened = read_bundle(bundle)
    work = workload(opened, PROMPT, 1, None, None)
    return bench(opened, work, against=against, model=model, repeats=REPEATS, progress=print).to_json()
