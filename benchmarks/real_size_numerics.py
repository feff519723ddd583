"""Builds a model of real size with random weights, and compares one denoising step with torch.

    python benchmarks/real_size_numerics.py --model sd15 --output benchmarks/results/real_size_numerics.json

The weights are seeded random numbers, written one tensor at a time; the pictures are noise, so this measures numerics,
time and memory, not quality. Every part runs in a process of its own, whose peak memory is that part's. A second bucket
is then added to the bundle and weighed. SDXL in float16 needs about 40 GB of disk and 24 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from export_scale import PUBLISHED, ROOT, measured_on

from toolchain.recipe import Bucket, Check, ComponentRecipe, Recipe, Sampling
from toolchain.store.plain_json import encode

DTYPES = {"sd15": "float32", "sdxl": "float16"}
FIRST, SECOND = Bucket(1, 512, 512), Bucket(1, 512, 768)


def recipe_of(model: str, *buckets: Bucket) -> Recipe:
    from toolchain.models.registry import MODELS

    folder_class = PUBLISHED[model].files["model_index.json"]["_class_name"]
    family = next(name for name, f in MODELS.items() if folder_class == f.pipeline)
    own = ComponentRecipe(dtype=DTYPES[model])  # type: ignore[arg-type]
    return Recipe(
        name=f"{model}-random",
        family=family,
        buckets=buckets,
        without=("vae_encoder",),
        components={"denoiser": own},
        sampling=Sampling(scheduler="euler", steps=20, schedulers=("euler",)),
        check=Check(prompts=("a lighthouse",)),
    )


def write_model(model: str, folder: Path) -> dict[str, Any]:
    """Configs, a tokenizer and random weights: in fan-in scale for matrices, ones and zeros for norms."""
    from toolchain.export.capture import capture
    from toolchain.models.hub import resolve_model
    from toolchain.models.registry import MODELS
    from toolchain.weights.derived import weight_uses
    from toolchain.weights.safetensors import write_safetensors

    PUBLISHED[model].write(folder)
    recipe = recipe_of(model, FIRST)
    source = resolve_model(str(folder))
    rng = np.random.default_rng(0)
    parameters = 0
    for component in MODELS[recipe.family].parts(recipe):
        uses = weight_uses(capture(component, source, recipe, FIRST))
        shapes = {use.key: (use.dtype, use.shape) for use in uses}

        def read(name: str, shapes: dict[str, Any] = shapes) -> Any:
            dtype, shape = shapes[name]
            kind = {"F32": np.float32, "F16": np.float16}[dtype]
            if len(shape) < 2:
                return np.full(shape, 0 if name.endswith("bias") else 1, kind)
            fan_in = int(np.prod(shape[1:])) if "embed" not in name else 1
            return (rng.standard_normal(shape, np.float32) * np.float32(fan_in**-0.5)).astype(kind)

        stem = "diffusion_pytorch_model" if component.folder in ("unet", "vae") else "model"
        path = folder / component.folder / f"{stem}.safetensors"
        write_safetensors(path, [(key, *shapes[key]) for key in sorted(shapes)], read)
        parameters += sum(int(np.prod(shape)) for _, shape in shapes.values())
        for name in ("vocab.json", "merges.txt"):
            if component.tokenizer:
                (folder / component.tokenizer).mkdir(exist_ok=True)
                shutil.copy(ROOT / "examples/shapes/model/tokenizer" / name, folder / component.tokenizer / name)
    return {"parameters": parameters}


def build(model: str, folder: Path, *buckets: Bucket) -> dict[str, Any]:
    import toolchain

    bundle = folder.parent / "bundle"
    before = size_of(bundle)
    toolchain.build(recipe_of(model, *buckets), str(folder), bundle, store=folder.parent / "store")
    return {"bundle_bytes": size_of(bundle), "added_bytes": size_of(bundle) - before}


def size_of(folder: Path) -> int:
    return sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())


def inputs_of(spec: Any, table: Any) -> dict[str, Any]:
    """One evaluation in the middle of a schedule, its text random."""
    from toolchain.engines.buffers import HostMemory
    from toolchain.runtime.start import place_sampler, place_scales, place_time_ids

    rng = np.random.default_rng(1)
    inputs = {
        t.name: rng.standard_normal(t.shape, np.float32) if t.dtype == "float32" else np.zeros(t.shape, t.dtype)
        for t in spec.inputs
    }
    inputs["state"][1:] = 0
    inputs["step"][...] = table.evaluations // 2
    memory = HostMemory()
    place_sampler(memory, inputs, table)
    place_scales(memory, inputs, {"guidance": 5.0, "guidance_rescale": 0.0})
    place_time_ids(memory, inputs, (512, 512, 0, 0, 512, 512), (512, 512, 0, 0, 512, 512))
    return inputs


def step_by_engine(model: str, folder: Path) -> dict[str, Any]:
    from toolchain.bundle.bundle import read_bundle
    from toolchain.engines.buffers import HostMemory
    from toolchain.engines.runners import runner_of
    from toolchain.runtime.engines import BoundEngine, open_engine
    from toolchain.sampler.compile import compile_table

    bundle = read_bundle(folder.parent / "bundle")
    started = time.perf_counter()
    memory = HostMemory()
    engine = open_engine(bundle, runner_of(bundle.backend), "denoiser", FIRST, memory)
    opened = time.perf_counter() - started
    bound = BoundEngine(engine, memory)
    inputs = inputs_of(engine.spec, compile_table("euler", 20, bundle.settings.scheduler))
    seconds, outputs = timed(lambda: bound(inputs))
    np.save(folder.parent / "engine.npy", outputs["next_state"][0])
    return {"open_s": round(opened, 2), "step_s": seconds}


def step_by_torch(model: str, folder: Path) -> dict[str, Any]:
    import torch

    from toolchain.models.hub import resolve_model
    from toolchain.models.registry import MODELS
    from toolchain.sampler.compile import compile_table

    recipe, source = recipe_of(model, FIRST), resolve_model(str(folder))
    component = MODELS[recipe.family].component("denoiser")
    spec = component.spec(source, FIRST, recipe)
    inputs = inputs_of(spec, compile_table("euler", 20, source.config("scheduler")))
    module = component.reference(source, recipe)
    tensors = [torch.from_numpy(inputs[t.name]) for t in spec.inputs]
    with torch.inference_mode():
        seconds, outputs = timed(lambda: module(*tensors))
    expected, got = outputs[0][0].numpy(), np.load(folder.parent / "engine.npy")
    start = inputs["state"][0]
    moved = expected - start  # what the network did to the latents, without the latents
    noise = float(np.square(got - expected, dtype=np.float64).mean())
    return {
        "step_s": seconds,
        "largest_difference": float(np.abs(got - expected).max()),
        "largest_value": float(np.abs(expected).max()),
        "snr_of_update_db": round(float(10 * np.log10(np.square(moved, dtype=np.float64).mean() / noise)), 1),
    }


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the second of two runs, and its result."""
    call()
    started = time.perf_counter()
    result = call()
    return round(time.perf_counter() - started, 2), result


PARTS: dict[str, Callable[[str, Path], dict[str, Any]]] = {
    "write": write_model,
    "build": lambda model, folder: build(model, folder, FIRST),
    "engine": step_by_engine,
    "torch": step_by_torch,
    "second_bucket": lambda model, folder: build(model, folder, FIRST, SECOND),
}


def run(part: str, model: str, folder: Path) -> dict[str, Any]:
    """A part in a process of its own: what it says, its seconds and its peak memory."""
    code = (
        "import json, resource, sys; from pathlib import Path; from real_size_numerics import PARTS\n"
        "found = PARTS[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))\n"
        "peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(json.dumps({**found, 'peak_gb': round(peak / 1e6, 2)}))"
    )
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", code, part, model, str(folder)],
        cwd=Path(__file__).parent,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": round(time.perf_counter() - started, 1), **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=sorted(DTYPES), required=True)
    parser.add_argument("--output", type=Path, required=True, help="JSON; results of the other model are kept")
    parser.add_argument("--scratch", type=Path, help="where the model and the bundle go  [default: a temporary folder]")
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text())["models"] if arguments.output.exists() else {}
    with tempfile.TemporaryDirectory(dir=arguments.scratch) as scratch:
        found: dict[str, Any] = {"denoiser_dtype": DTYPES[arguments.model], "bucket": str(FIRST), "second": str(SECOND)}
        for part in PARTS:
            found[part] = run(part, arguments.model, Path(scratch) / "model")
            print(part, found[part], flush=True)
    result = {"machine": measured_on(), "models": {**known, arguments.model: found}}
    arguments.output.write_text(encode(result) + "\n")


if __name__ == "__main__":
    main()
