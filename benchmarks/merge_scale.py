"""Whether the real-size graphs of several buckets become one, for TensorRT engines that share their weights; as JSON.

    python benchmarks/merge_scale.py --output benchmarks/results/merge_scale.json

Exports the denoiser of each published model from its config for a square, a portrait and a batch of two, merges the
graphs, and asks the rules of TensorRT's parser about the result. No weights are read, and nothing is run.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

from export_scale import PUBLISHED, ROOT, measured_on

from toolchain.engines.tensorrt.build import TensorRtBuilder
from toolchain.export.capture import capture
from toolchain.graph.parser_rules import refusals
from toolchain.graph.profiles import merge_buckets, read_profiles
from toolchain.models.hub import resolve_model
from toolchain.models.registry import family_of
from toolchain.recipe import Bucket, load_recipe

TENSORRT = (11, 4)
SIDE = {"sd15": 512}


def merge(model: str) -> dict[str, Any]:
    side = SIDE.get(model, 1024)
    buckets = [Bucket(1, side, side), Bucket(1, side * 5 // 4, side * 3 // 4), Bucket(2, side, side)]
    recipe = load_recipe(ROOT / "recipes" / f"{PUBLISHED[model].recipe}.toml")
    with tempfile.TemporaryDirectory() as folder:
        PUBLISHED[model].write(Path(folder))
        source = resolve_model(folder)
        denoiser = family_of(source, recipe).component("denoiser")
        graphs = [capture(denoiser, source, recipe, bucket) for bucket in buckets]
    started = time.perf_counter()
    merged = merge_buckets(graphs)
    seconds = time.perf_counter() - started
    return {
        "buckets": [str(bucket) for bucket in buckets],
        "dtype": recipe.component("denoiser").dtype,
        "seconds": round(seconds, 2),
        "nodes": [sum(n.op_type != "Constant" for n in graph.graph) for graph in (*graphs, merged)],
        "profiles": len(read_profiles(merged)),
        "refused": refusals(TensorRtBuilder().prepare(merged), TENSORRT),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=PUBLISHED, action="append")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    known = json.loads(arguments.output.read_text())["models"] if arguments.output.exists() else {}
    for model in arguments.model or PUBLISHED:
        known[model] = merge(model)
        print(model, known[model])
        arguments.output.write_text(json.dumps({"machine": measured_on(), "models": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
