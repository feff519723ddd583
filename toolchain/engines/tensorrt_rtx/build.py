"""Engines of TensorRT for RTX, compiled for compute capabilities and not for a model of GPU.

Their kernels are finished on the user's GPU, when an engine is opened. So one bundle, built on a laptop or by a CI job,
serves every RTX card. Everything else is as with TensorRT: see `engines.tensorrt.library` for the two libraries.
"""

from __future__ import annotations

from typing import Any

from toolchain.engines.tensorrt.build import PlanBuilder
from toolchain.engines.tensorrt.library import TENSORRT_RTX, Library
from toolchain.recipe.options import TensorRtRtxOptions


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

    def refuses_quantized(self, options: TensorRtRtxOptions) -> str | None:
        """None."""
        return None

    def reads_weights(self, options: TensorRtRtxOptions) -> bool:
        """No: plans hold their weights."""
        return False
