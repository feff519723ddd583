"""Engines of TensorRT, versions 10.13 to 11.x, for one NVIDIA GPU.

An engine is a plan: kernels chosen and timed for one graph with static shapes, on one model of GPU. Building runs in a
process of its own (`builder_process`, `build_plan`). A plan holds the weights that it was built with; a stripped one is
filled from the bundle's weight file when it is opened. This module imports TensorRT only to ask its version.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from toolchain.engines.tensorrt.device import gpu_device
from toolchain.engines.tensorrt.library import TENSORRT, Library, numbers
from toolchain.engines.tensorrt.prepare import finish, prepare
from toolchain.engines.tensorrt.rtx_targets import FLOAT8
from toolchain.errors import EngineError
from toolchain.recipe.options import TensorRtOptions, TensorRtRtxOptions

if TYPE_CHECKING:
    from toolchain.recipe import Quantize

log = logging.getLogger("toolchain")

ROUTES = (11, 1)
"""The first version with build routes."""
Options = TypeVar("Options", TensorRtOptions, TensorRtRtxOptions)


class PlanBuilder(Generic[Options]):
    """What the builders of TensorRT and of TensorRT for RTX have in common. Nothing is packed."""

    name: str
    library: Library
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    run_options: tuple[str, ...]

    def device(self) -> dict[str, Any]:
        """What engines are tied to. Raises EngineError."""
        raise NotImplementedError

    def warning(self, quantize: Quantize) -> str | None:
        """None."""
        return None

    prepare = staticmethod(prepare)
    finish = staticmethod(finish)

    def merges(self, options: Options) -> bool:
        """Whether a plan has an optimization profile for each bucket."""
        return options.profile_per_bucket

    def refuses_dtype(self, dtype: str, options: Options) -> None:
        """None."""
        return

    def packer(self, options: Options) -> None:
        """None: a plan holds weights in its kernels' layout."""
        return

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: Options,
        progress: Callable[[str, float | None], None] = lambda phase, share: None,
    ) -> None:
        """Writes `engine.plan` and `engine.json`, and for a stripped plan `graph.onnx`. Raises EngineError."""
        from toolchain.engines.tensorrt.builder_process import run_builder

        device = self.device()
        self._warn_of_refusals(graph)
        cache = self._timing_cache(device, options)
        job = {
            "backend": self.name,
            "graph": str(graph),
            "weights": str(weights["weights"]),
            "out": str(out),
            "options": {name: value for name, value in asdict(options).items() if name not in self.run_options},
            "device": device,
            "timing_cache": None if cache is None else str(cache),
        }
        with self._exclusive(device):
            run_builder(job, progress)

    def _timing_cache(self, device: Mapping[str, Any], options: Options) -> Path | None:
        """The file in which measurements of kernels are kept; None where nothing is timed."""
        return None

    def _exclusive(self, device: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Waits for what a build must have to itself: nothing, where nothing is measured."""
        return nullcontext()

    def _warn_of_refusals(self, graph: Path) -> None:
        """Says what the parser will stumble over, before a builder is waited for and started."""
        import onnx_ir as ir

        from toolchain.graph.parser_rules import refusals

        try:
            lines = refusals(ir.load(graph), numbers(self.library.version()))
        except Exception as error:  # a forecast; only the parser may refuse a graph
            lines = [f"its rules cannot be applied ({error})"]
        for line in lines:
            log.warning("TensorRT's parser may refuse the graph: %s", line)


class TensorRtBuilder(PlanBuilder[TensorRtOptions]):
    """`Builder` of the backend `tensorrt`."""

    name = "tensorrt"
    library: Library = TENSORRT
    run_options: tuple[str, ...] = ("cuda_graph",)

    def device(self) -> dict[str, Any]:
        """The GPU and the version of TensorRT. EngineError without TensorRT, cuda-python, a driver that is new enough,
        and a GPU."""
        return gpu_device(self.library)

    def problems(self, options: TensorRtOptions) -> list[str]:
        """Build routes where the installed version has none."""
        version = self.library.installed() if options.build_route else None
        if version is None or numbers(version) >= ROUTES:
            return []
        return [f"build_route: TensorRT {version} has no build routes (expected 11.1 or newer)"]

    def refuses_quantized(self, quantize: Quantize, options: TensorRtOptions) -> str | None:
        """A stripped plan, as refitting quantised weights was not tried; float8 on a GPU that has none, and for GPUs of
        which the oldest have none."""
        if options.strip_plan:
            return "tensorrt.strip_plan fills in plain weights alone (expected false)"
        if quantize.weights != "float8":
            return None
        if options.hardware_compatibility_level == "ampere_plus":
            return (
                f"float8 came with {FLOAT8}, and tensorrt.hardware_compatibility_level is for 8.0 and newer "
                '(expected "none" or "same_compute_capability"; got "ampere_plus")'
            )
        try:
            device = self.device()
        except EngineError:
            return None  # nothing can be built here in any case
        capability = device["compute_capability"]
        if numbers(capability) >= numbers(FLOAT8):
            return None
        gpu = f"{device['name']} (compute capability {capability})"
        return f"{gpu} has no float8, which came with {FLOAT8} (expected int8 or int4)"

    def reads_weights(self, options: TensorRtOptions) -> bool:
        """Whether plans are stripped of their weights."""
        return options.strip_plan

    def _timing_cache(self, device: Mapping[str, Any], options: TensorRtOptions) -> Path | None:
        from toolchain.engines.tensorrt.timing_cache import timing_cache_path

        level = options.builder_optimization_level  # 0 times nothing
        return timing_cache_path(device[self.name], device["name"], level) if level else None

    def _exclusive(self, device: Mapping[str, Any]) -> AbstractContextManager[None]:
        from toolchain.engines.tensorrt.timing_cache import only_builder

        return only_builder(_uuid(), device["name"])


def _uuid() -> str:
    """Which of several equal GPUs this is, whatever its number in this process."""
    from toolchain.cuda.driver import call

    return bytes(call("cudaGetDeviceProperties", 0).uuid.bytes).hex()
