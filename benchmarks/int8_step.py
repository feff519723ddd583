"""One denoising step of SD 1.5 at half width in int8: time, error and size against float32, and time against diffusers.

    python benchmarks/int8_step.py --output benchmarks/results/int8_step.json

The model of `benchmarks/speed.py`: seeded random weights, whose pictures are noise and whose work is real. It is
calibrated on four prompts, and measured on the trajectory of a fifth. The engines take turns, step by step.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from speed import PROMPT, half_width_recipe, write_model

import toolchain
from toolchain.builder.plan import make_plan
from toolchain.builder.steps import StepId
from toolchain.bundle.bundle import Bundle
from toolchain.engines.buffers import HostMemory
from toolchain.engines.cpu import physical_cores
from toolchain.engines.machine import machine
from toolchain.engines.onnxruntime.run import OnnxRuntimeEngine, OnnxRuntimeRunner
from toolchain.models.hub import resolve_model
from toolchain.precision.weight_only import CONVOLUTIONS, survey, weighted
from toolchain.recipe import Calibration, ComponentRecipe, Quantize, Recipe
from toolchain.runtime.engines import BoundEngine, open_engine
from toolchain.runtime.pipeline import Pipeline
from toolchain.store.artifacts import Store
from toolchain.store.plain_json import encode

CALIBRATED = (
    "a lighthouse at dusk",
    "a bowl of cherries on a blue table",
    "an old map of an island",
    "two cats asleep on a red sofa",
)
Inputs = dict[str, Any]


def recipe_in_int8(plain: Recipe, smoothing: float) -> Recipe:
    quantize = Quantize("int8", scales="mse", activations="int8", smoothing=smoothing)
    return replace(
        plain,
        name=f"{plain.name}-int8",
        components={"denoiser": ComponentRecipe(quantize=quantize)},
        calibration=Calibration(prompts=CALIBRATED),
    )


class RecordingRunner(OnnxRuntimeRunner):
    """Keeps what the denoiser is given, launch by launch."""

    def __init__(self) -> None:
        self.steps: list[Inputs] = []

    def open(self, *arguments: Any, **options: Any) -> OnnxRuntimeEngine:
        engine = super().open(*arguments, **options)
        if any(tensor.name == "next_state" for tensor in engine.spec.outputs):
            bind = engine.bind

            def recording(buffers: Any) -> Callable[[], None]:
                launch = bind(buffers)

                def record() -> None:
                    self.steps.append({tensor.name: buffers[tensor.name].copy() for tensor in engine.spec.inputs})
                    launch()

                return record

            engine.bind = recording  # type: ignore[method-assign]
        return engine


def trajectory(bundle: Bundle) -> list[Inputs]:
    runner = RecordingRunner()
    with closing(Pipeline(bundle, backend=runner, warm_up=False)) as pipe:
        pipe([PROMPT], seed=[0])
    return runner.steps


def diffusers_step(model: Path, steps: list[Inputs]) -> Callable[[int], None]:
    """The network alone, eager, over both rows of guidance."""
    import torch
    from diffusers import UNet2DConditionModel

    torch.set_num_threads(physical_cores())
    unet = UNet2DConditionModel.from_pretrained(model / "unet").eval()
    latents = torch.zeros(2, 4, 32, 32)

    def step(number: int) -> None:
        with torch.inference_mode():
            unet(latents, 500, torch.from_numpy(steps[number]["context"]))

    return step


def share_in_int8(recipe: Recipe, model: Path, store: Path) -> float:
    """Of the multiply-accumulates of convolutions and products with weights."""
    plan = make_plan(recipe, resolve_model(str(model)), Store(store))
    artifact = plan.artifact(StepId("graph", "denoiser", str(recipe.buckets[0])))
    assert artifact is not None
    graph = ir.load(artifact.file("graph.onnx"))
    quantized = set(survey(plan.backend.prepare(graph), ()).quantized)
    macs = {False: 0, True: 0}
    for name, node in weighted(plan.backend.prepare(graph)):
        output, weight = node.outputs[0].shape, node.inputs[1]
        assert output is not None
        assert weight is not None
        assert weight.shape is not None
        shape = output.numpy()
        channels = shape[1 if node.op_type in CONVOLUTIONS else -1]
        macs[name in quantized] += prod(shape) * prod(weight.shape.numpy()) // channels
    return macs[True] / sum(macs.values())


def measure(model: Path, scratch: Path, repeats: int) -> dict[str, Any]:
    store, plain = scratch / "store", half_width_recipe()
    small = recipe_in_int8(plain, 0.5)
    bundles = {
        r.name: toolchain.build(r, str(model), scratch / r.name, store=store, gate=False) for r in (plain, small)
    }
    steps = trajectory(bundles[plain.name])
    memory, bucket = HostMemory(), plain.buckets[0]
    engines = {
        name: BoundEngine(open_engine(bundle, OnnxRuntimeRunner(), "denoiser", bucket, memory), memory)
        for name, bundle in bundles.items()
    }
    eager = diffusers_step(model, steps)
    times: dict[str, list[float]] = {name: [] for name in ("float32", "int8", "diffusers")}
    errors = []
    for number in [*range(len(steps))] * repeats:
        outputs = []
        for name, engine in zip(("float32", "int8"), engines.values(), strict=True):
            started = time.perf_counter()
            outputs.append(engine(steps[number])["next_state"][0].copy())
            times[name].append(time.perf_counter() - started)
        started = time.perf_counter()
        eager(number)
        times["diffusers"].append(time.perf_counter() - started)
        errors.append(psnr_db(*outputs))
    weights = {name: weight_bytes(bundle) for name, bundle in bundles.items()}
    return {
        "ms": {name: {"median": 1e3 * statistics.median(t), "least": 1e3 * min(t)} for name, t in times.items()},
        "psnr_db": errors[: len(steps)],
        "share_of_macs": share_in_int8(plain, model, store),
        "weight_mb": {"float32": weights[plain.name], "int8": weights[small.name]},
        "calibration": {"prompts": len(CALIBRATED), "steps": plain.sampling.steps, "smoothing": 0.5},
    }


def psnr_db(expected: np.ndarray, found: np.ndarray) -> float:
    """Over the range of the expected latents."""
    error = float(((expected - found) ** 2).mean())
    return float(10 * np.log10(float(np.ptp(expected)) ** 2 / error))


def weight_bytes(bundle: Bundle) -> dict[str, float]:
    """In MB: the checkpoint's weights as they are stored, and what ONNX Runtime reordered of them beside."""
    entry = bundle.engine("denoiser", bundle.buckets[0])
    return {role: bundle.files[file].size / 1e6 for role, file in entry.weights.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        write_model(model)
        found = measure(model, Path(folder), arguments.repeats)
    arguments.output.write_text(encode({"machine": machine(), "sd15_half_width": found}) + "\n")
    print(found)


if __name__ == "__main__":
    main()
