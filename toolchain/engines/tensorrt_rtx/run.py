"""Engines of TensorRT for RTX, run: on which GPUs they can, and how they are opened."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from toolchain.engines.tensorrt.library import TENSORRT_RTX, Library, numbers
from toolchain.engines.tensorrt.run import AMPERE, PlanRunner
from toolchain.recipe.options import TensorRtRtxOptions


class TensorRtRtxRunner(PlanRunner[TensorRtRtxOptions]):
    """`Runner` of the backend `tensorrt_rtx`."""

    name = "tensorrt_rtx"
    library: Library = TENSORRT_RTX

    def _refuse_gpu(
        self, built_on: Mapping[str, Any], here: Mapping[str, Any], options: TensorRtRtxOptions
    ) -> str | None:
        ours, targets = str(here["compute_capability"]), options.targets
        if ours in targets or (not targets and numbers(ours) >= AMPERE):
            return None
        wanted = ", ".join(targets) or "8.0 and newer"
        return f"compiled for compute capability {wanted}, this machine has {here['name']} (compute capability {ours})"
