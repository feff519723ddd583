"""Engines of ONNX Runtime on an NVIDIA GPU: files as on the CPU, optimised for CUDA's kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.cuda.driver import ALLOCATION
from toolchain.engines.onnxruntime.optimize import optimized, save_engine
from toolchain.engines.onnxruntime.package import warn_of_clash
from toolchain.engines.onnxruntime.session import CPU_PROVIDER, GRAPH
from toolchain.engines.onnxruntime_cuda.prepare import finish, prepare
from toolchain.engines.onnxruntime_cuda.provider import (
    PROVIDER,
    cuda_device,
    cuda_session_options,
    load_libraries,
)
from toolchain.recipe.options import OnnxRuntimeCudaOptions

if TYPE_CHECKING:
    from toolchain.recipe import Quantize


class OnnxRuntimeCudaBuilder:
    """`Builder` of the backend `onnxruntime_cuda`. Its kernels take weights as they are: nothing is packed."""

    name = "onnxruntime_cuda"
    dtypes: tuple[str, ...] = ("float32", "float16")
    run_options: tuple[str, ...] = ("cuda_graph", "prefer_nhwc", "tf32")

    def device(self) -> dict[str, Any]:
        """The GPU's name and the version of ONNX Runtime. Raises EngineError without either."""
        return cuda_device()

    def problems(self, options: OnnxRuntimeCudaOptions) -> list[str]:
        """None. Warns where both packages of ONNX Runtime are installed."""
        warn_of_clash()
        return []

    def refuses_dtype(self, dtype: str, options: OnnxRuntimeCudaOptions) -> None:
        """None."""
        return

    def refuses_quantized(self, quantize: Quantize, options: OnnxRuntimeCudaOptions) -> str | None:
        """Not tried on a GPU yet."""
        return f"{self.name} cannot run quantised weights (expected onnxruntime, tensorrt or tensorrt_rtx)"

    def warning(self, quantize: Quantize) -> str | None:
        """None."""
        return None

    prepare = staticmethod(prepare)
    finish = staticmethod(finish)

    def merges(self, options: OnnxRuntimeCudaOptions) -> bool:
        """No: each bucket has a graph with static shapes."""
        return False

    def reads_weights(self, options: OnnxRuntimeCudaOptions) -> bool:
        """Yes: weight files are read when an engine is opened."""
        return True

    def packer(self, options: OnnxRuntimeCudaOptions) -> None:
        """None: CUDA's kernels take weights as they are."""
        return

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: OnnxRuntimeCudaOptions,
        progress: Callable[[str, float | None], None] = lambda phase, share: None,
    ) -> None:
        """Writes `graph.onnx`. Raises EngineError and WeightsError."""
        load_libraries()
        providers = (PROVIDER, CPU_PROVIDER)
        with (
            ALLOCATION,  # a session takes memory of the GPU
            optimized(graph, weights["weights"], out, options.optimization, cuda_session_options(), providers) as model,
        ):
            save_engine(model, weights, out / GRAPH)
