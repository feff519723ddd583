"""TensorRT for RTX: engines for whole generations of GPUs, built on any machine and without a GPU.

An engine is compiled for compute capabilities, not for a model of GPU; its kernels are finished on the user's GPU, when
the engine is opened. So one bundle, built on a laptop or by a CI job, serves every RTX card. All else is as with
TensorRT, whose code this drives: see `tensorrt_library` for the two libraries.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from toolchain.engines.tensorrt.backend import AMPERE, TensorRtBackend
from toolchain.engines.tensorrt.library import TENSORRT_RTX, Library, numbers


class TensorRtRtxBackend(TensorRtBackend):
    name = "tensorrt_rtx"
    library: Library = TENSORRT_RTX
    run_options: tuple[str, ...] = ("cuda_graph", "kernel_specialization")

    def device(self) -> dict[str, Any]:
        """No GPU: the engines of one recipe are the same wherever they are built. EngineError without the library."""
        return {"kind": "cuda", self.name: self.library.version()}

    def reads_weights(self, options: Mapping[str, Any]) -> bool:
        return False

    def problems(self, options: Mapping[str, Any]) -> list[str]:
        return []

    def _refuse_gpu(
        self, built_on: Mapping[str, Any], here: Mapping[str, Any], options: Mapping[str, Any]
    ) -> str | None:
        ours, targets = str(here["compute_capability"]), options["targets"]
        if ours in targets or (not targets and numbers(ours) >= AMPERE):
            return None
        wanted = ", ".join(targets) or "8.0 and newer"
        return f"compiled for compute capability {wanted}, this machine has {here['name']} (compute capability {ours})"

    def _timing_cache(self, device: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        return None  # nothing is timed

    @contextmanager
    def _turn(self, device: Mapping[str, Any]) -> Iterator[None]:
        yield  # builders that measure nothing may run side by side
