"""What each choice of the CPU path is worth: milliseconds of one denoising step, SD 1.5 at half width, 256x256.

    python benchmarks/options.py --output benchmarks/results/options.json

Every variant differs from what a build makes in one thing alone. All are open at once and run in turn, so that the
machine's drift hits all alike.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx_ir as ir
from export_scale import measured_on
from speed import half_width_recipe, write_model

from toolchain.engines.buffers import HostMemory
from toolchain.engines.onnxruntime import build as ort_build
from toolchain.engines.onnxruntime import run as ort_run
from toolchain.engines.onnxruntime.session import PACKED, session_options
from toolchain.export.capture import capture
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.recipe.options import OnnxRuntimeOptions
from toolchain.runtime.engines import BoundEngine
from toolchain.store.plain_json import encode
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.safetensors import read_folder

VARIANTS: dict[str, dict[str, Any]] = {
    "as built": {},
    "attention as exported": {"fused": False},
    "matrices not packed": {"packed": False},
    "no blocked convolutions": {"optimization": "extended"},
    "no fusions of ONNX Runtime": {"optimization": "basic"},
    "opset 23": {"opset": 23},
    "one thread": {"threads": 1},
}


@contextlib.contextmanager
def without_packing() -> Iterator[None]:
    def options(threads: int) -> Any:
        return session_options(threads, {"session.disable_prepacking": "1"})

    with contextlib.ExitStack() as stack:
        for module in (ort_build, ort_run):
            stack.enter_context(mock.patch.object(module, "session_options", options))
        yield


def opened(
    model: Path, folder: Path, *, fused: bool = True, packed: bool = True, opset: int | None = None, **changed: Any
) -> BoundEngine:
    """The denoiser, built in `folder` with one thing otherwise, on inputs that are not all zero."""
    recipe, source, builder = half_width_recipe(), resolve_model(str(model)), ort_build.OnnxRuntimeBuilder()
    component, bucket, options = MODELS["sd"].component("denoiser"), recipe.buckets[0], OnnxRuntimeOptions(**changed)
    with contextlib.ExitStack() as stack:
        if not fused:
            stack.enter_context(mock.patch("toolchain.graph.attention.fuse_attention", lambda graph: graph))
        if not packed:
            stack.enter_context(without_packing())
        if opset is not None:
            stack.enter_context(mock.patch("toolchain.export.capture.OPSET", opset))
        graph = builder.prepare(capture(component, source, recipe, bucket))
        folder.mkdir()
        ir.save(graph, folder / "exported.onnx")
        files = {"weights": folder / "weights.safetensors"}
        uses, checkpoint = weight_uses(graph), model / component.folder
        write_weights(uses, find_tensors(uses, read_folder(checkpoint), checkpoint), files["weights"])
        pack = builder.packer(options)
        if pack is not None:
            pack(folder / "exported.onnx", files, folder)
            files["packed"] = folder / PACKED
        builder.build(folder / "exported.onnx", files, folder, options)
        memory = HostMemory()
        spec = component.spec(source, bucket, recipe)
        engine = ort_run.OnnxRuntimeRunner().open(folder, files, spec, options, memory)
    bound = BoundEngine(engine, memory)
    rng = np.random.default_rng(0)
    for tensor in engine.spec.inputs:
        if tensor.dtype == "float32":
            bound.inputs[tensor.name][...] = rng.standard_normal(tensor.shape, np.float32)
    return bound


def timed(engine: BoundEngine) -> float:
    started = time.perf_counter()
    engine({})
    return (time.perf_counter() - started) * 1e3


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=7)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        write_model(scratch / "model")
        engines, failed = {}, {}
        for number, (name, changes) in enumerate(VARIANTS.items()):
            try:
                engines[name] = opened(scratch / "model", scratch / str(number), **changes)
            except Exception as error:  # what cannot be built is a finding too
                failed[name] = f"{type(error).__name__}: {error}"
            print(name, failed.get(name, "built"), flush=True)
        for engine in engines.values():
            engine({})
        rounds = [{name: timed(engine) for name, engine in engines.items()} for _ in range(arguments.rounds)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in engines}
    for name, ms in medians.items():
        print(f"{name}: {ms:.0f} ms a step, {ms / medians['as built']:.2f} times as long")
    result = {"machine": measured_on(), "ms_per_step": medians, "rounds": rounds, "failed": failed}
    arguments.output.write_text(encode(result) + "\n")


if __name__ == "__main__":
    main()
