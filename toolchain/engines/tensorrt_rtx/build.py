"""Engines of TensorRT for RTX, compiled for compute capabilities and not for a model of GPU.

Their kernels are finished on the user's GPU, when an engine is opened. So one bundle, built on a laptop or by a CI job,
serves every RTX card. Everything else is as with TensorRT: see `engines.tensorrt.library` for the two libraries.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.engines.tensorrt.build import PlanBuilder
from toolchain.engines.tensorrt.library import TENSORRT_RTX, Library
from toolchain.engines.tensorrt.rtx_targets import FLOAT8, WITH_FLOAT8
from toolchain.recipe.options import TensorRtRtxOptions

if TYPE_CHECKING:
    from toolchain.recipe import Quantize


class TensorRtRtxBuilder(PlanBuilder[TensorRtRtxOptions]):
    """`Builder` of the backend `tensorrt_rtx`."""

    name = "tensorrt_rtx"
    library: Library = TENSORRT_RTX
    run_options: tuple[str, ...] = ("cuda_graph", "kernel_specialization")

    def device(self) -> dict[str, Any]:
        """No GPU: the engines of one recipe are the same wherever they are built. EngineError without the library."""
        return {"kind": "cuda", self.name: self.library.version()}

    def problems(self, options: TensorRtRtxOptions) -> list[str]:
        """None."""
        return []

    def refuses_quantized(self, quantize: Quantize, options: TensorRtRtxOptions) -> str | None:
        """float8 for targets that have none."""
        early = [target for target in options.targets or ("none",) if target not in WITH_FLOAT8]
        if quantize.weights != "float8" or not early:
            return None
        got = ", ".join(options.targets) or "none named, which stands for all from 8.0 on"
        return f"float8 came with {FLOAT8} (expected tensorrt_rtx.targets of {', '.join(WITH_FLOAT8)}; got {got})"

    def reads_weights(self, options: TensorRtRtxOptions) -> bool:
        """No: plans hold their weights."""
        return False
