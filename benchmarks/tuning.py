"""Tunes `shapes` in int8, activations too, on 64 captions of its training: the recipe shapes-int8 and its numbers.

    python benchmarks/tuning.py --store artifacts --recipe shapes-int8.toml --output benchmarks/results/tuning.json

The captions that `evaluate.py` scores are held out of the training, and are none of these.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import numpy as np

from toolchain.api import tune_recipe
from toolchain.engines.machine import machine
from toolchain.recipe.toml import toml
from toolchain.store.plain_json import encode

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "examples" / "shapes"))

from scenes import all_scenes  # noqa: E402

SINGLE, PAIRS = 8, 56
BUDGETS = ("psnr_db>=28", "median_psnr_db>=36")
ROUNDED = {"weights": "int8", "activations": "int8"}
STORED = {"weights": "int8", "scales": "mse"}


def captions() -> list[str]:
    """Scenes of one thing and of two, of the training."""
    training, _ = all_scenes()
    chosen = np.random.default_rng(14)
    kinds = [[s for s in training if len(s.things) == count] for count in (1, 2)]
    counts = zip(kinds, (SINGLE, PAIRS), strict=True)
    return [kind[i].caption for kind, count in counts for i in chosen.permutation(len(kind))[:count]]


def recipe() -> str:
    """What may be quantised: all of the model, and where a picture's time goes the activations too."""
    parts = {"text_encoder": STORED, "denoiser": ROUNDED, "vae_decoder": ROUNDED, "vae_encoder": STORED}
    return toml(
        {
            "family": "sd",
            "buckets": ["1x64x64", "4x64x64"],
            "components": {name: {"quantize": table} for name, table in parts.items()},
            "calibration": {"prompts": captions()},
            "sampling": {
                "guidance": 3.0,
                "schedulers": ["model", "ddim", "euler", "euler-a", "dpm++2m:karras", "unipc"],
                "step_counts": [20],
            },
            "check": {
                "prompts": [
                    "a red circle left of a blue square on a white background",
                    "a yellow triangle above a purple ring on a black background",
                    "a green cross on a gray background",
                ],
                "seeds": [0, 1],
            },
        }
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--store", type=Path, required=True, help="goes on with what was measured there")
    parser.add_argument("--recipe", type=Path, required=True, help="the tuned recipe, a new file")
    parser.add_argument("--html", type=Path, help="also write a page")
    parser.add_argument("--output", type=Path, required=True, help="write the result into this file")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        given = Path(scratch) / "shapes-int8.toml"
        given.write_text(recipe())
        tuned = tune_recipe(
            given,
            ROOT / "examples" / "shapes" / "model",
            arguments.recipe,
            budget=BUDGETS,
            store=arguments.store,
            html=arguments.html,
            progress=lambda text: print(text, file=sys.stderr),
        )
    document = {key: value for key, value in tuned.to_json().items() if key != "recipe"}
    arguments.output.write_text(encode({"machine": machine(), **document}) + "\n")
    print("\n".join(tuned.lines()))


if __name__ == "__main__":
    main()
