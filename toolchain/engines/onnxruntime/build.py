"""Engines of ONNX Runtime on the CPU: the graph optimised for this machine, and its weights in files beside it.

Tensors that the optimiser makes, such as reordered convolution weights, depend on the weights but not on the bucket:
they go into one packed file that all buckets share. (MatMul kernels still keep packed copies per session.)
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.engines.cpu import cpu_features, physical_cores, saturates_int8
from toolchain.engines.onnxruntime.device import cpu_device
from toolchain.engines.onnxruntime.optimize import (
    content_of,
    initializers,
    optimized,
    save_engine,
    tensors_by_content,
)
from toolchain.engines.onnxruntime.package import warn_of_clash
from toolchain.engines.onnxruntime.prepare import finish, prepare
from toolchain.engines.onnxruntime.session import CPU_PROVIDER, GRAPH, PACKED, session_options
from toolchain.recipe.options import OnnxRuntimeOptions
from toolchain.store.facts import ENGINE_FACTS
from toolchain.weights.mapped import MappedWeights

if TYPE_CHECKING:
    from toolchain.recipe import Quantize

PACKED_FROM_BYTES = 1024
"""Smaller tensors stay in the graph."""


class OnnxRuntimeBuilder:
    """`Builder` of the backend `onnxruntime`."""

    name = "onnxruntime"
    dtypes: tuple[str, ...] = ("float32", "float16")  # its CPU kernels have no bfloat16 convolution
    run_options: tuple[str, ...] = ("threads",)

    def device(self) -> dict[str, Any]:
        """The CPU's instruction set and the version of ONNX Runtime. Raises EngineError without ONNX Runtime."""
        return cpu_device()

    def problems(self, options: OnnxRuntimeOptions) -> list[str]:
        """None. Warns where both packages of ONNX Runtime are installed."""
        warn_of_clash()
        return []

    def refuses_dtype(self, dtype: str, options: OnnxRuntimeOptions) -> None:
        """None."""
        return

    def refuses_quantized(self, quantize: Quantize, options: OnnxRuntimeOptions) -> str | None:
        """None: weights are widened when they are used, those in int4 by the product itself."""
        return None

    def warning(self, quantize: Quantize) -> str | None:
        """Of a CPU whose integer kernels saturate."""
        if quantize.activations == "none" or not saturates_int8():
            return None
        return "this CPU has no VNNI: its products in int8 saturate, which check shows, and are hardly faster"

    prepare = staticmethod(prepare)
    finish = staticmethod(finish)

    def merges(self, options: OnnxRuntimeOptions) -> bool:
        """No: each bucket has a graph with static shapes."""
        return False

    def reads_weights(self, options: OnnxRuntimeOptions) -> bool:
        """Yes: weight files are mapped when an engine is opened."""
        return True

    def packer(self, options: OnnxRuntimeOptions) -> Callable[[Path, Mapping[str, Path], Path], None] | None:
        """Of the level whose layout pass reorders convolution weights."""
        return partial(_pack, options=options) if options.optimization == "all" else None

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: OnnxRuntimeOptions,
        progress: Callable[[str, float | None], None] = lambda phase, share: None,
    ) -> None:
        """Writes `graph.onnx` and `engine.json`. Raises EngineError and WeightsError."""
        from toolchain.engines.onnxruntime.activations import memory_facts

        with optimized(graph, weights["weights"], out, *_settings(options)) as model:
            save_engine(model, weights, out / GRAPH)
            (out / ENGINE_FACTS).write_text(json.dumps(memory_facts(model, cpu_features()), indent=1) + "\n")


def _settings(options: OnnxRuntimeOptions) -> tuple[str, Any, tuple[str, ...]]:
    """Level, session options and providers to optimise with."""
    return options.optimization, session_options(options.threads or physical_cores()), (CPU_PROVIDER,)


def _pack(graph: Path, weights: Mapping[str, Path], out: Path, *, options: OnnxRuntimeOptions) -> None:
    from toolchain.graph.placeholder import static_shape
    from toolchain.weights.derived import SAFETENSORS_DTYPES
    from toolchain.weights.safetensors import write_safetensors

    with (
        optimized(graph, weights["weights"], out, *_settings(options)) as model,
        MappedWeights(weights["weights"]) as base,
    ):
        known = tensors_by_content({"weights": base})
        packed = {}
        for name, tensor in initializers(model):
            large = tensor.nbytes > PACKED_FROM_BYTES and tensor.dtype in SAFETENSORS_DTYPES
            if large and content_of(tensor.numpy()) not in known:
                packed[name] = (SAFETENSORS_DTYPES[tensor.dtype], static_shape(tensor), tensor)
        names = sorted(packed)
        write_safetensors(out / PACKED, [(n, *packed[n][:2]) for n in names], lambda n: packed[n][2].numpy())
