"""What a precision costs: pictures of `shapes` by one bundle against another's, and what their captions score.

    python benchmarks/quality.py --bundle int8 --bundle naive --against float32 --output benchmarks/results/quality.json

All bundles draw the same held-out captions from the same seeds, in turn, so that the times of a step can be compared
too. FLIP needs the extra `metrics`; without it there is none.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from skimage.metrics import structural_similarity

import toolchain
from toolchain.bundle.bundle import read_bundle
from toolchain.check.flip import mean_flip
from toolchain.check.report import Pair
from toolchain.engines.machine import machine
from toolchain.store.plain_json import encode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

from evaluate import GUIDANCE, STEPS, held_out_scenes, shares  # noqa: E402
from scenes import Pixels, Scene, score  # noqa: E402

PART = 16
"""Captions of a call: the largest bucket divides it."""


@dataclass
class Drawn:
    """What one bundle drew, and how long an evaluation of its denoiser took, at the batch of its largest bucket."""

    pictures: list[Pixels] = field(default_factory=list)
    steps_ms: list[float] = field(default_factory=list)


def chosen_scenes(captions: int) -> list[Scene]:
    """That many of the 200 held-out scenes, evenly spaced: lone shapes and pairs."""
    scenes = held_out_scenes()
    return [scenes[i * len(scenes) // captions] for i in range(captions)]


def draw(bundles: list[Path], scenes: list[Scene]) -> list[Drawn]:
    """The scenes by each bundle, part by part in turn; the seed of a caption is its number."""
    drawn = [Drawn() for _ in bundles]
    with ExitStack() as stack:
        pipes = [stack.enter_context(closing(toolchain.load(bundle))) for bundle in bundles]
        for first in range(0, len(scenes), PART):
            part = [scene.caption for scene in scenes[first : first + PART]]
            seeds = list(range(first, first + len(part)))
            for pipe, target in zip(pipes, drawn, strict=True):
                result = pipe(part, seed=seeds, steps=STEPS, guidance=GUIDANCE, scheduler="model")
                target.pictures += [np.asarray(image) for image in result.images]
                target.steps_ms += result.timings.steps_ms
    return drawn


def compared(pictures: list[Pixels], reference: list[Pixels]) -> dict[str, Any]:
    """PSNR, SSIM and FLIP of each pair: the median and the worst."""
    pairs = [Pair(r, p) for r, p in zip(reference, pictures, strict=True)]
    ssim = [float(structural_similarity(p.reference, p.compiled, channel_axis=-1, data_range=255)) for p in pairs]
    flips = [flip for p in pairs if (flip := mean_flip(p.reference, p.compiled)) is not None]
    psnr = [p.psnr_db for p in pairs]
    return {
        "psnr_db": {"median": statistics.median(psnr), "min": min(psnr)},
        "ssim": {"median": statistics.median(ssim), "min": min(ssim)},
        "flip": {"median": statistics.median(flips), "max": max(flips)} if flips else None,
    }


def facts(bundle: Path, drawn: Drawn, scenes: list[Scene]) -> dict[str, Any]:
    """The captions' score, the time of a step, and bytes on disk by component."""
    opened = read_bundle(bundle)
    scores = [score(scene, picture) for scene, picture in zip(scenes, drawn.pictures, strict=True)]
    sizes = {
        component: sum(f.size for name, f in opened.files.items() if name.startswith(f"engines/{component}/"))
        for component in opened.engines
    }
    return {
        "recipe": opened.recipe.name,
        "score": shares(scores),
        "step_ms": statistics.median(drawn.steps_ms),
        "bytes": {"bundle": sum(f.size for f in opened.files.values()), **sizes},
    }


def line(name: str, result: dict[str, Any]) -> str:
    psnr, ssim, flip = (result[key] for key in ("psnr_db", "ssim", "flip"))
    parts = [f"PSNR median {psnr['median']:.1f} dB, min {psnr['min']:.1f} dB", f"SSIM min {ssim['min']:.4f}"]
    parts += [] if flip is None else [f"FLIP median {flip['median']:.4f}, max {flip['max']:.4f}"]
    parts += [f"captions {result['score']['everything']:.1%} right", f"{result['times_as_long']:.2f} times as long"]
    return f"{name}: " + ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bundle", type=Path, action="append", required=True, help="may be given several times")
    parser.add_argument("--against", type=Path, required=True, help="the bundle that the others are compared with")
    parser.add_argument("--captions", type=int, default=64, help="up to 200")
    parser.add_argument("--output", type=Path, help="write the result into this file")
    arguments = parser.parse_args()

    scenes = chosen_scenes(arguments.captions)
    reference, *others = draw([arguments.against, *arguments.bundle], scenes)
    against = facts(arguments.against, reference, scenes)
    result: dict[str, Any] = {"machine": machine(), "captions": len(scenes), "against": against, "bundles": {}}
    print(f"{against['recipe']}: captions {against['score']['everything']:.1%} right")
    for bundle, drawn in zip(arguments.bundle, others, strict=True):
        found = facts(bundle, drawn, scenes) | compared(drawn.pictures, reference.pictures)
        found["times_as_long"] = found["step_ms"] / against["step_ms"]
        found["share_of_bytes"] = {name: size / against["bytes"][name] for name, size in found["bytes"].items()}
        result["bundles"][found["recipe"]] = found
        print(line(found["recipe"], found))
    if arguments.output:
        arguments.output.write_text(encode(result) + "\n")


if __name__ == "__main__":
    main()
