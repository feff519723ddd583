"""A bundle of TensorRT for RTX, built elsewhere without a GPU: is it valid here, does it draw the CPU's picture?

NVIDIA lists no compute capability 9.0 for it, so a machine with such a GPU is asked rather than trusted to say no.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from benchmarks.gpu_run.record import Record
from toolchain.bundle import read_bundle
from toolchain.check.report import Pair
from toolchain.engines import BACKENDS
from toolchain.engines.cuda import device_facts
from toolchain.engines.tensorrt_library import LIBRARIES_BY_BACKEND
from toolchain.provenance import note_built
from toolchain.runtime.pipeline import Pipeline

BUNDLE, EXPECTED = "bundle", "expected.npz"
PROMPT, SEED = "a red circle left of a blue square on a white background", 7


def measure(record: Record) -> None:
    measure_folder(record, Path(os.environ["DIFFBUILD_GPU_RUN"]) / "unpacked" / "rtx_bundle")


def measure_folder(record: Record, folder: Path) -> None:
    """The answers of the library first: they come whether or not the bundle can be opened."""
    bundle = read_bundle(folder / BUNDLE)
    bundle.verify()
    backend = BACKENDS[bundle.backend]
    options = bundle.recipe.to_json()[bundle.backend]
    record("bundle", {"built_on": dict(bundle.device), "tools": dict(bundle.tools)})
    record.stage("gpu", device_facts)
    plans = sorted(path for path in (folder / BUNDLE).rglob("*.plan"))
    record.stage("raw", lambda: {str(p.relative_to(folder)): answers(bundle.backend, p) for p in plans})
    record.stage("refusal", lambda: {"reason": backend.available() or backend.refuse(bundle.device, options)})
    note_built(bundle)  # its pieces were compared with the digests that came with them
    expected = np.load(folder / EXPECTED)
    record.stage("picture", lambda: drawn(folder / BUNDLE, expected))
    if "error" in record.found["stages"]["picture"] and record.found["stages"]["refusal"].get("reason"):
        with mock.patch.object(type(backend), "refuse", return_value=None):
            record.stage("picture_although_refused", lambda: drawn(folder / BUNDLE, expected))


def answers(backend: str, plan: Path) -> dict[str, Any]:
    """What NVIDIA's runtime says of a plan, and whether it opens and gives a context."""
    trt = LIBRARIES_BY_BACKEND[backend].module()
    said: list[str] = []

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            if severity.name in ("INTERNAL_ERROR", "ERROR", "WARNING"):
                said.append(f"{severity.name}: {msg}")

    logger = Log()
    runtime = trt.Runtime(logger)
    data = plan.read_bytes()
    found: dict[str, Any] = {"version": trt.__version__, "plan_bytes": len(data), "said": said}
    if hasattr(runtime, "get_engine_validity"):
        validity, diagnostics = runtime.get_engine_validity(data)
        flags = trt.EngineInvalidityDiagnostics.__members__
        # A set of flags may come as their sum, which is no member.
        found["validity"] = str(validity)
        found["diagnostics"] = [name for name, flag in flags.items() if int(flag) & int(diagnostics)]
    engine = runtime.deserialize_cuda_engine(data)
    found["deserialised"] = engine is not None
    if engine is not None:
        found["context"] = engine.create_execution_context() is not None
    return found


def drawn(bundle: Path, expected: Any) -> dict[str, Any]:
    from toolchain.signing import admit

    pipe = Pipeline(admit(read_bundle(bundle)), open_buckets=1)
    try:
        first, second = (pipe(PROMPT, seed=SEED) for _ in range(2))
    finally:
        pipe.close()
    pixels = np.asarray(first.images[0])
    return {
        "psnr_db": Pair(expected["pixels"], pixels).psnr_db,
        "largest_difference_of_latents": float(np.abs(first.latents - expected["latents"]).max()),
        "repeats": bool((pixels == np.asarray(second.images[0])).all()),
        "ms": second.timings.total_ms,
    }


def make(folder: Path, recipe: Any, model: Path, store: Path) -> None:
    """Builds the bundle, and the CPU's picture to hold it against."""
    import dataclasses

    import toolchain

    toolchain.build(recipe, str(model), folder / BUNDLE, store=store)
    on_host = dataclasses.replace(recipe, name=f"{recipe.name}-expected", backend="onnxruntime")
    toolchain.build(on_host, str(model), folder / "host", store=store)
    pipe = toolchain.load(folder / "host")
    result = pipe(PROMPT, seed=SEED)
    pipe.close()
    np.savez(folder / EXPECTED, pixels=np.asarray(result.images[0]), latents=result.latents)
