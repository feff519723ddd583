"""How long a step of the denoiser takes with quantisation and without, on the device that the engines are for."""

from __future__ import annotations

import statistics
import time
from contextlib import ExitStack, closing
from typing import Any

import numpy as np

from toolchain.bundle.bundle import Bundle
from toolchain.engines.runners import runner_of
from toolchain.errors import EngineError
from toolchain.recipe import Quantize
from toolchain.runtime.engines import BoundEngine, open_engine, open_memory

DENOISER = "denoiser"
ROUNDS, ENOUGH_S = 15, 20.0
"""Rounds of one step each, as many as fit into that time; three at least."""
FASTER = 0.95
"""Times that differ by less than this are no gain: it is what two runs of one engine differ by."""


def compare_step_times(bundle: Bundle, unquantized: Bundle | None) -> dict[str, Any]:
    """Median times of a step of the first bucket, the engines taking turns, and what they say in words.

    `text` is always there; the numbers are where both engines could be run.
    """
    quantize = bundle.recipe.component(DENOISER).quantize
    if quantize is None:
        return {"text": "the denoiser is not quantised: its steps take as long as without"}
    if unquantized is None:
        return {
            "text": "no time to compare with: the store had no engine of the denoiser without quantisation; build the "
            "recipe without its tables quantize first"
        }
    try:
        ours, theirs = _medians(bundle, unquantized)
    except (EngineError, MemoryError) as error:
        return {"text": f"no time to compare with: {str(error).splitlines()[0]}"}
    plain_type = bundle.recipe.component(DENOISER).dtype
    saved = weight_bytes(unquantized) - weight_bytes(bundle)
    return {
        "text": describe(quantize, plain_type, ours, theirs, saved),
        "bucket": str(bundle.buckets[0]),
        "quantized_ms": ours,
        "unquantized_ms": theirs,
        "times_as_long": ours / theirs,
        "saved_bytes": saved,
    }


def describe(quantize: Quantize, plain_type: str, ours_ms: float, theirs_ms: float, saved_bytes: int) -> str:
    """The times in words: whether the smaller type is faster, and if not, why, and what it is good for."""
    ratio = ours_ms / theirs_ms
    times = f"{ratio:.2f} times as long as in {plain_type} ({ours_ms:.1f} ms, {theirs_ms:.1f} ms)"
    saves = f"it saves {saved_bytes / 1e6:.0f} MB of the denoiser's files" if saved_bytes > 0 else "it saves no space"
    if ratio < FASTER:
        return f"{quantize.weights} is faster here: a step takes {times}; {saves}"
    # ONNX Runtime has products of its own for int4.
    widened = quantize.activations == "none" and quantize.weights != "int4"
    why = ", as weights are widened in every step" if widened else ""
    return f"{quantize.weights} is not faster here: a step takes {times}{why}; {saves}"


def weight_bytes(bundle: Bundle) -> int:
    """What the denoiser's engine of the first bucket and its weight files take on disk."""
    entry = bundle.engine(DENOISER, bundle.buckets[0])
    files = [*(bundle.path / entry.folder).iterdir(), *(bundle.path / name for name in entry.weights.values())]
    return sum(file.stat().st_size for file in files)


def _medians(*bundles: Bundle) -> list[float]:
    """Milliseconds of a step in each. EngineError."""
    with ExitStack() as stack:
        launches = []
        for bundle in bundles:
            runner = runner_of(bundle.backend)
            memory = stack.enter_context(closing(open_memory(bundle, runner, 1)))
            engine = open_engine(bundle, runner, DENOISER, bundle.buckets[0], memory)
            launches.append((stack.enter_context(closing(BoundEngine(engine, memory))), memory))
        for bound, memory in launches:
            random = np.random.default_rng(0)
            shapes = {t.name: t.shape for t in bound.spec.inputs if t.dtype != "int64"}
            bound({name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()})
            memory.read()
        times: list[list[float]] = [[] for _ in bundles]
        began = time.perf_counter()
        while len(times[0]) < 3 or (len(times[0]) < ROUNDS and time.perf_counter() - began < ENOUGH_S):
            for (bound, memory), measured in zip(launches, times, strict=True):
                started = time.perf_counter()
                bound({})
                memory.read()
                measured.append((time.perf_counter() - started) * 1e3)
        return [statistics.median(measured) for measured in times]
