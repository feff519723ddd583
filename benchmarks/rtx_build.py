"""Engines of real size by TensorRT for RTX, on a machine without a GPU: time, memory and size of a build, as JSON.

    python benchmarks/rtx_build.py --output benchmarks/results/rtx_build.json
    python benchmarks/rtx_build.py --part sdxl --output rtx.json
    python benchmarks/rtx_build.py --part sdxl-int8 --part flux-dev-int4 --output benchmarks/results/rtx_quantized.json

Each part exports a denoiser from its published config in the precision of its recipe, writes weights of seeded random
numbers beside it, and has the backend build one engine: for the first bucket of the recipe or, in the parts that end in
"-buckets", for all of them. `flux-dev` is parsed alone, over weights of zeros that take no disk: to build it takes more
memory than this was made for. `cpu_seconds` and `peak_gb` are those of the builder's process; the weights that it was
given are mapped and count in its memory as far as it has read them. Results of other parts in the output are kept.

The parts that end in "-int8" and "-int4" are quantised as their recipe says, or weight by weight where there is none;
`quantizing` has what that took, without the making of the random numbers, and how large the file is against one in the
component's own type. `--without-engine` stops there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from export_scale import PUBLISHED, ROOT, measured_on
from numpy.typing import NDArray

RECIPES = {
    "sdxl-int8": "sdxl-fp16-rtx",
    "flux-dev-int4": "flux1-dev-int4-rtx",
    "sd15": "sd15-fp16-rtx",
    "sdxl": "sdxl-fp16-rtx",
    "sd35-medium": "sd35-medium-bf16-rtx",
    "flux-dev": "flux1-dev-bf16-rtx",
}
PARTS = ("sd15", "sdxl", "sd35-medium", "sdxl-buckets", "flux-dev")
QUANTIZED = ("sdxl-int8", "flux-dev-int4")
PARSED = frozenset({"flux-dev"})
POOL = 1 << 24


def export(model: str, folder: Path, all_buckets: bool) -> int:
    """Writes graph.onnx of the denoiser as the backend takes it, and returns the number of its buckets."""
    import onnx_ir as ir

    from toolchain.engines.builders import builder_of
    from toolchain.export.capture import capture
    from toolchain.graph.profiles import merge_buckets
    from toolchain.models.hub import resolve_model
    from toolchain.models.registry import family_of
    from toolchain.precision.stored import Form
    from toolchain.precision.weight_only import quantize_weights
    from toolchain.recipe import Quantize, load_recipe

    PUBLISHED[model.removesuffix("-int8").removesuffix("-int4")].write(folder / "model")
    recipe = load_recipe(ROOT / "recipes" / f"{RECIPES[model]}.toml")
    source = resolve_model(str(folder / "model"))
    denoiser = family_of(source, recipe).component("denoiser")
    buckets = recipe.buckets if all_buckets else recipe.buckets[:1]
    graphs = [capture(denoiser, source, recipe, bucket) for bucket in buckets]
    graph = graphs[0] if len(graphs) == 1 else merge_buckets(graphs)
    prepared = builder_of("tensorrt_rtx").prepare(graph)
    if model in QUANTIZED:
        table = recipe.component("denoiser").quantize or Quantize("int8")
        prepared = quantize_weights(prepared, table.exclude, Form(table.weights, table.block))
    ir.save(prepared, folder / "graph.onnx")
    return len(graphs)


def write_weights(folder: Path, zeros: bool) -> dict[str, Any]:
    """Writes weights.safetensors for the graph, one tensor in memory at a time.

    Random: cut from a pool of numbers at random places, and scaled by the fan-in. Zeros: a hole in the file.
    """
    import onnx_ir as ir

    from toolchain.weights.derived import FLOAT_DTYPES, WeightUse, weight_uses, write_loaded

    uses = weight_uses(ir.load(folder / "graph.onnx"))
    pool = np.random.default_rng(0).standard_normal(2 * POOL, np.float32)
    made = 0.0

    def load(use: WeightUse) -> NDArray[Any]:
        nonlocal made
        started = time.perf_counter()
        rng = np.random.default_rng(zlib.crc32(use.name.encode()))  # the same where it is read again
        count = math.prod(use.shape)
        pieces = [pool[start : start + POOL] for start in rng.integers(0, POOL, -(-count // POOL))]
        scale = np.float32(math.prod(use.shape[1:]) ** -0.5) if len(use.shape) > 1 else np.float32(0.1)
        values = (np.concatenate(pieces)[:count] * scale).reshape(use.shape).astype(FLOAT_DTYPES[use.dtype])
        made += time.perf_counter() - started
        return values

    path = folder / "weights.safetensors"
    started = time.perf_counter()
    if zeros:
        _write_hole(path, [(use.name, use.dtype, use.shape) for use in uses])
    else:
        write_loaded(uses, load, path, "max")
    size = path.stat().st_size
    result: dict[str, Any] = {"weights_gb": round(size / 1e9, 3)}
    if any(use.stored for use in uses):
        plain = sum(math.prod(use.shape) * FLOAT_DTYPES[use.dtype].itemsize for use in uses)
        result["quantizing"] = {
            "share": round(size / plain, 4),
            "weights": sum(use.stored is not None for use in uses),
            "seconds": round(time.perf_counter() - started - made, 1),
            "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        }
    return result


def _write_hole(path: Path, tensors: Sequence[tuple[str, str, Sequence[int]]]) -> None:
    sizes = {"F32": 4, "F16": 2, "BF16": 2}
    entries, end = {}, 0
    for name, dtype, shape in tensors:
        size = sizes[dtype] * math.prod(shape)
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)


def build(folder: Path) -> dict[str, Any]:
    """Has the backend build. The builder is the only child of this process, whose usage is that of its children."""
    from toolchain.engines.builders import builder_of
    from toolchain.recipe.options import TensorRtRtxOptions

    out = folder / "engine"
    out.mkdir()
    started = time.perf_counter()
    builder_of("tensorrt_rtx").build(
        folder / "graph.onnx", {"weights": folder / "weights.safetensors"}, out, TensorRtRtxOptions()
    )
    seconds, usage = time.perf_counter() - started, resource.getrusage(resource.RUSAGE_CHILDREN)
    facts = json.loads((out / "engine.json").read_text())
    return {
        "seconds": round(seconds, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
        "plan_gb": round(facts["plan_bytes"] / 1e9, 3),
        "activation_gb": round(facts["activation_bytes"] / 1e9, 3),
        "fused_attention": facts["layers"]["fused_attention"],
        "kinds": facts["layers"]["kinds"],
        "tensorrt_rtx": facts["tensorrt_rtx"],
    }


def parse_alone(folder: Path) -> dict[str, Any]:
    """The real parser over the mapped weights, in this process."""
    import onnx_ir as ir

    from toolchain.engines.tensorrt.build_monitor import make_logger
    from toolchain.engines.tensorrt.library import TENSORRT_RTX
    from toolchain.engines.tensorrt.network import create_network, parse
    from toolchain.weights.mapped import MappedWeights

    trt, graph, file = TENSORRT_RTX.module(), folder / "graph.onnx", folder / "weights.safetensors"
    logger, model = make_logger(trt), ir.load(graph)
    network = create_network(trt, trt.Builder(logger))
    started = time.perf_counter()
    with MappedWeights(file) as weights:
        kept = parse(trt, network, model, graph, file, weights, folder, logger)  # raises where anything is refused
        layers = network.num_layers
        del kept
    return {
        "parsed": True,
        "layers": layers,
        "seconds": round(time.perf_counter() - started, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "tensorrt_rtx": trt.__version__,
    }


def stage(name: str, part: str, folder: Path) -> dict[str, Any]:
    """One stage of a part, in a process of its own: a child's peak of memory begins at its parent's."""
    done = subprocess.run(
        [sys.executable, __file__, "--stage", name, part, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=True,
    )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def run_stage(name: str, part: str, folder: Path) -> dict[str, Any]:
    model = part.removesuffix("-buckets")
    if name == "export":
        return {"buckets": export(model, folder, part != model)}
    if name == "weights":
        return write_weights(folder, part in PARSED)
    return parse_alone(folder) if part in PARSED else build(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument(
        "--part",
        choices=PARTS + QUANTIZED,
        action="append",
        help="one or more; all but the quantised where none is given",
    )
    parser.add_argument("--without-engine", action="store_true", help="graph and weights alone")
    parser.add_argument("--stage", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.stage:
        name, part, folder = arguments.stage
        print(json.dumps(run_stage(name, part, Path(folder))))
        return
    if arguments.output is None:
        parser.error("--output is required")
    known = json.loads(arguments.output.read_text())["parts"] if arguments.output.is_file() else {}
    for part in arguments.part or PARTS:
        with tempfile.TemporaryDirectory() as folder:
            result: dict[str, Any] = {"recipe": RECIPES[part.removesuffix("-buckets")], "load": os.getloadavg()[0]}
            for name in ("export", "weights") if arguments.without_engine else ("export", "weights", "engine"):
                print(f"{part} {name} ...", file=sys.stderr, flush=True)
                result |= stage(name, part, Path(folder))
                print(json.dumps(result), file=sys.stderr, flush=True)
        known[part] = result
        arguments.output.write_text(json.dumps({"machine": measured_on(), "parts": known}, indent=1) + "\n")


if __name__ == "__main__":
    main()
