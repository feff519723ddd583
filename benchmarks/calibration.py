"""What calibration costs over plain denoising, on `shapes` and on SD 1.5 at half width.

    python benchmarks/calibration.py --output benchmarks/results/calibration.json

Each picture is drawn by the plain bundle and by the calibration, in turn in one run. The times of the latter have all
in them that a picture costs there: denoising, decoding, reading and adding up the ranges, and saving them so that an
interruption loses one picture at most.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import tempfile
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from speed import SHAPES, half_width_recipe, write_model

import toolchain
from toolchain.builder.open_model import open_model
from toolchain.builder.plan import execute, plan_calibration
from toolchain.engines.machine import machine
from toolchain.recipe import Calibration, Recipe, load_recipe
from toolchain.store.artifacts import Store
from toolchain.store.plain_json import encode
from toolchain.weights.range_file import read_ranges

PROMPTS = tuple(
    f"a {colour} {shape} on a white background"
    for colour in ("red", "blue", "green", "yellow")
    for shape in ("circle", "square", "triangle", "ring")
)


def measure(recipe: Recipe, model: Path, scratch: Path, pictures: int) -> dict[str, Any]:
    recipe = replace(recipe, buckets=recipe.buckets[:1], calibration=Calibration(PROMPTS[:pictures]))
    toolchain.build(recipe, str(model), scratch / recipe.name, store=scratch / "store")
    plan = plan_calibration(recipe, open_model(str(model)), Store(scratch / "store"))
    plain_s: list[float] = []
    watched_s: list[float] = []
    with closing(toolchain.load(scratch / recipe.name)) as pipe:
        pipe(PROMPTS[0], seed=0)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        began = [0.0]

        def picture(step: Any, phase: str, share: float | None) -> None:
            if step.stage != "calibration":
                return
            number = len(plain_s)
            if number:
                watched_s.append(time.perf_counter() - began[0])
            started = time.perf_counter()
            pipe(PROMPTS[number], seed=number)
            plain_s.append(time.perf_counter() - started)
            began[0] = time.perf_counter()

        built = execute(plan, lambda step, what: None, picture)
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    artifact = built[plan.steps[-1].id]
    ranges = read_ranges(artifact.file("ranges.safetensors"))
    # The first of them opens kernels and pages.
    ratios = [w / p for w, p in zip(watched_s[1:], plain_s[1:], strict=False)]
    return {
        "pictures": pictures,
        "steps": recipe.sampling.steps,
        "plain_s": statistics.median(plain_s[1:]),
        "calibration_s": statistics.median(watched_s[1:]),
        "ratio": statistics.median(ratios),
        "ratios": ratios,
        "weights": {name: len(found) for name, found in ranges.components.items()},
        "file_bytes": ranges.path.stat().st_size,
        "peak_bytes_with_plain_pipeline": after * 1024,
        "peak_bytes_of_plain_pipeline": before * 1024,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pictures", type=int, default=6)
    parser.add_argument("--models", nargs="*", default=["shapes", "sd15_half_width"])
    arguments = parser.parse_args()
    result: dict[str, Any] = {"machine": machine()}
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        for name in arguments.models:
            if name == "shapes":
                recipe, model = load_recipe("shapes-fp32"), SHAPES
            else:
                recipe, model = half_width_recipe(), scratch / "model"
                write_model(model)
            found = result[name] = measure(recipe, model, scratch, arguments.pictures)
            print(f"{name}: {found['plain_s']:.2f} s plain, {found['calibration_s']:.2f} s, {found['ratio']:.2f} times")
            arguments.output.write_text(encode(result) + "\n")


if __name__ == "__main__":
    main()
