"""Scores the bundled model on 200 captions that it never saw in training.

    python examples/shapes/evaluate.py --model examples/shapes/model      # drawn by diffusers
    python examples/shapes/evaluate.py --bundle demo/shapes               # drawn by a bundle

The scorer reads background, colours, shapes and places back from pixels. It is first validated on ground-truth drawings
of the same captions, where it must find at least 99 % right.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image
from scenes import Pixels, Scene, Score, all_scenes, draw, score

CAPTIONS = 200
STEPS, GUIDANCE = 20, 3.0
FACTS = ("background", "colours", "shapes", "place", "everything")


def held_out_scenes() -> list[Scene]:
    """200 held-out scenes: every single thing that was held out, the rest pairs."""
    _, held_out = all_scenes()
    single = [s for s in held_out if len(s.things) == 1]
    double = [s for s in held_out if len(s.things) == 2]
    chosen = np.random.default_rng(1).permutation(len(double))[: CAPTIONS - len(single)]
    return [*single, *(double[i] for i in chosen)]


def shares(scores: list[Score]) -> dict[str, float]:
    return {fact: round(float(np.mean([getattr(s, fact) for s in scores])), 4) for fact in FACTS}


def validate_scorer(scenes: list[Scene]) -> dict[str, float]:
    """The scorer on ground-truth drawings. Raises SystemExit below 99 %."""
    rng = np.random.default_rng(2)
    found = shares([score(scene, draw(scene, rng)) for scene in scenes])
    if found["everything"] < 0.99:
        raise SystemExit(f"the scorer finds only {found['everything']:.1%} of ground-truth drawings right")
    return found


def draw_with_diffusers(model: Path) -> Callable[[list[str], list[int]], list[Pixels]]:
    import torch
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)

    def run(prompts: list[str], seeds: list[int]) -> list[Pixels]:
        generators = [torch.Generator().manual_seed(s) for s in seeds]
        images = pipeline(
            prompts, num_inference_steps=STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="np"
        ).images
        return list((images * 255).round().astype(np.uint8))

    return run


def draw_with_bundle(bundle: Path) -> Callable[[list[str], list[int]], list[Pixels]]:
    import toolchain

    pipe = toolchain.load(bundle)

    def run(prompts: list[str], seeds: list[int]) -> list[Pixels]:
        images = pipe(prompts, seed=seeds, steps=STEPS, guidance=GUIDANCE, scheduler="model").images
        return [np.asarray(image) for image in images]

    return run


def contact_sheet(pictures: list[Pixels], columns: int = 10) -> Image.Image:
    rows = [np.concatenate(pictures[i : i + columns], axis=1) for i in range(0, len(pictures), columns)]
    return Image.fromarray(np.concatenate(rows)).resize((columns * 128, len(rows) * 128), Image.Resampling.NEAREST)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path)
    source.add_argument("--bundle", type=Path)
    parser.add_argument("--sheet", type=Path, help="write all pictures into this PNG")
    parser.add_argument("--json", type=Path, help="write the result into this file")
    arguments = parser.parse_args()

    scenes = held_out_scenes()
    result: dict[str, object] = {"captions": len(scenes), "scorer_on_drawings": validate_scorer(scenes)}
    run = draw_with_diffusers(arguments.model) if arguments.model else draw_with_bundle(arguments.bundle)
    pictures: list[Pixels] = []
    for first in range(0, len(scenes), 20):
        part = scenes[first : first + 20]
        pictures += run([s.caption for s in part], list(range(first, first + len(part))))
    scores = [score(scene, picture) for scene, picture in zip(scenes, pictures, strict=True)]
    result["model"] = shares(scores)
    if arguments.sheet:
        contact_sheet(pictures).save(arguments.sheet)
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
