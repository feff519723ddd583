"""A bundle of TensorRT for RTX, built elsewhere without a GPU: is it valid here, does it draw the CPU's picture?

NVIDIA lists no compute capability 9.0 for it, so a machine with such a GPU is asked rather than trusted to say no.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.gpu_run.record import ROOT, Record
from toolchain.bundle.bundle import read_bundle
from toolchain.bundle.provenance import note_built
from toolchain.bundle.signing import admit
from toolchain.check.report import Pair
from toolchain.cuda.driver import device_facts
from toolchain.engines.runners import runner_of
from toolchain.engines.tensorrt.library import TENSORRT_RTX
from toolchain.engines.tensorrt.rtx_runtime import ask_validity, runtime_config
from toolchain.recipe import Recipe
from toolchain.runtime.pipeline import Pipeline

RECIPE = Path(__file__).parent / "shapes-rtx.toml"
MODEL = ROOT / "examples" / "shapes" / "model"
BUNDLE, EXPECTED = "bundle", "expected.npz"
PROMPT, SEED = "a red circle left of a blue square on a white background", 7


def measure(record: Record) -> None:
    measure_folder(record, Path(os.environ["DIFFBUILD_GPU_RUN"]) / "unpacked" / "rtx_bundle")


def measure_folder(record: Record, folder: Path) -> None:
    """What the library says of each plan first: it is known even where opening one kills the process."""
    bundle = read_bundle(folder / BUNDLE)
    bundle.verify()
    backend = runner_of(bundle.backend)
    options = bundle.recipe.options(bundle.backend)
    record("bundle", {"built_on": dict(bundle.device), "tools": dict(bundle.tools)})
    record.stage("gpu", device_facts)
    record.stage("refusal", lambda: {"reason": backend.available() or backend.refuse(bundle.device, options)})
    plans = {str(path.relative_to(folder)): path for path in sorted((folder / BUNDLE).rglob("*.plan"))}
    record.stage("validity", lambda: {name: validity(plan) for name, plan in plans.items()})
    for name, plan in plans.items():
        record.stage(f"opened {name}", lambda p=plan: opened(p))  # type: ignore[misc]
    note_built(bundle)  # its pieces were compared with the digests that came with them
    expected = np.load(folder / EXPECTED)
    if not record.stage("picture", lambda: drawn(folder / BUNDLE, expected)):
        with (
            mock.patch.object(type(backend), "refuse", return_value=None),
            mock.patch("toolchain.engines.tensorrt.open_plan.ask_validity", return_value=("valid", "not asked")),
        ):
            record.stage("picture_unasked", lambda: drawn(folder / BUNDLE, expected))


def runtime_and_log() -> tuple[Any, list[str]]:
    """A runtime of the library, and what it will say from warnings on."""
    trt = TENSORRT_RTX.module()
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                said.append(f"{severity.name}: {msg}")

    return trt.Runtime(Log()), said


def validity(plan: Path) -> dict[str, Any]:
    runtime, said = runtime_and_log()
    data = plan.read_bytes()
    answer, why = ask_validity(TENSORRT_RTX.module(), runtime, data)
    return {"plan_bytes": len(data), "answer": answer, "why": why, "said": said}


def opened(plan: Path) -> dict[str, Any]:
    """Whether a plan opens and gives a context, whatever its validity."""
    runtime, said = runtime_and_log()
    engine = runtime.deserialize_cuda_engine(plan.read_bytes())
    found = {"engine": engine is not None, "context": False, "said": said}
    if engine is not None:
        config = runtime_config(TENSORRT_RTX.module(), engine, "eager")
        found["context"] = engine.create_execution_context(config) is not None
    return found


def drawn(bundle: Path, expected: Any) -> dict[str, Any]:
    pipe = Pipeline(admit(read_bundle(bundle)), open_buckets=1)
    try:
        first, second = (pipe(PROMPT, seed=SEED) for _ in range(2))
        captures = pipe._memory.counters.captures
    finally:
        pipe.close()
    pixels = np.asarray(first.images[0])
    return {
        "psnr_db": Pair(expected["pixels"], pixels).psnr_db,
        "largest_difference_of_latents": float(np.abs(first.latents - expected["latents"]).max()),
        "repeats": bool((pixels == np.asarray(second.images[0])).all()),
        "captures": captures,
        "ms": second.timings.total_ms,
    }


def make(folder: Path, recipe: Recipe, model: Path, store: Path) -> None:
    """Builds the bundle, and the CPU's picture to hold it against."""
    import toolchain

    toolchain.build(recipe, str(model), folder / BUNDLE, store=store)
    on_host = dataclasses.replace(recipe, name=f"{recipe.name}-expected", backend="onnxruntime")
    toolchain.build(on_host, str(model), folder / "host", store=store)
    pipe = toolchain.load(folder / "host")
    result = pipe(PROMPT, seed=SEED)
    pipe.close()
    np.savez(folder / EXPECTED, pixels=np.asarray(result.images[0]), latents=result.latents)
