"""TensorRT on one NVIDIA GPU, versions 10.13 to 11.x.

An engine is a plan: kernels chosen and timed for one graph with static shapes, on one model of GPU. Building runs in a
process of its own (`builder_process`, `tensorrt_build`). A plan holds the weights that it was built with; a stripped
one is filled from the bundle's weight file when it is opened. This module imports TensorRT only to ask its version.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.engines.tensorrt.builder_process import Progress, run_builder
from toolchain.engines.tensorrt.library import TENSORRT, Library, numbers
from toolchain.engines.tensorrt.timing_cache import only_builder, timing_cache_path
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir

log = logging.getLogger("toolchain")

SAFE = (11,)
ROUTES = (11, 1)
AMPERE = (8, 0)
DOCTOR = "diffbuild doctor"


class TensorRtBackend:
    name = "tensorrt"
    library: Library = TENSORRT
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    run_options: tuple[str, ...] = ("cuda_graph",)

    def available(self) -> str | None:
        try:
            self.gpu()
        except EngineError as error:
            text = f"{error.what}: {error.got}" if error.got else error.what
            text += f", expected {error.expected}" if error.expected else ""
            return text if error.hint in (None, DOCTOR) else f"{text} ({error.hint})"
        return None

    def device(self) -> dict[str, Any]:
        """EngineError without TensorRT, cuda-python, a driver that is new enough, and a GPU."""
        return self.gpu()

    def gpu(self) -> dict[str, Any]:
        """The GPU at hand, and the version of the library. EngineError where there is none of either."""
        version = self.library.version()
        from toolchain.cuda.driver import available, device_facts

        reason = available()
        if reason:
            lacks_package = reason.startswith("cuda-python")
            raise EngineError(reason, hint=self.library.install if lacks_package else DOCTOR)
        return {"kind": "cuda", **device_facts(), self.name: version}

    def refuse(self, built_on: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
        here = self.gpu()
        if built_on.get("kind") != here["kind"]:
            return f"built on {built_on.get('kind')}, this machine is {here['kind']}"
        built, ours = str(built_on.get(self.name)), here[self.name]
        if built != ours:
            title = self.library.title
            return f"built with {title} {built}, this machine has {ours}, and the engines need that version"
        return self._refuse_gpu(built_on, here, options)

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        built = built_on.get(self.name)
        return None if built is None or built == self.library.installed() else self.library.exactly(str(built))

    def _refuse_gpu(
        self, built_on: Mapping[str, Any], here: Mapping[str, Any], options: Mapping[str, Any]
    ) -> str | None:
        """Why kernels of one GPU cannot run on another, given the level of compatibility they were built with."""
        level = options["hardware_compatibility_level"]
        theirs, ours = str(built_on.get("compute_capability")), str(here["compute_capability"])
        if level == "ampere_plus":
            fits, needs = numbers(theirs) >= AMPERE <= numbers(ours), "compute capability 8.0 or newer"
        elif level == "same_compute_capability":
            fits, needs = theirs == ours, f"compute capability {theirs}"
        else:
            names = ("name", "compute_capability", "sm_count")
            fits, needs = all(built_on.get(n) == here.get(n) for n in names), "that very GPU"
        if fits:
            return None
        facts = ((d.get("name"), d.get("compute_capability"), d.get("sm_count")) for d in (built_on, here))
        first, second = (f"{name} (compute capability {cc}, {count} multiprocessors)" for name, cc, count in facts)
        return f"built on {first}, this machine has {second}, and the engines need {needs}"

    def problems(self, options: Mapping[str, Any]) -> list[str]:
        version = self.library.installed() if options["build_route"] else None
        if version is None or numbers(version) >= ROUTES:
            return []
        return [f"build_route: TensorRT {version} has no build routes (expected 11.1 or newer)"]

    def prepare(self, graph: ir.Model) -> ir.Model:
        from toolchain.graph.opset import allow_bfloat16

        return allow_bfloat16(graph)

    def merges(self, options: Mapping[str, Any]) -> bool:
        return bool(options["profile_per_bucket"])

    def reads_weights(self, options: Mapping[str, Any]) -> bool:
        return bool(options["strip_plan"])

    def packs(self, options: Mapping[str, Any]) -> bool:
        return False

    def pack(self, graph: Path, weights: Mapping[str, Path], out: Path, options: Mapping[str, Any]) -> None:
        raise AssertionError("TensorRT packs nothing")

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: Mapping[str, Any],
        progress: Progress = lambda phase, share: None,
    ) -> None:
        device = self.device()
        self._warn_of_refusals(graph)
        job = {
            "backend": self.name,
            "graph": str(graph),
            "weights": str(weights["weights"]),
            "out": str(out),
            "options": {name: value for name, value in options.items() if name not in self.run_options},
            "device": device,
            "timing_cache": self._timing_cache(device, options),
        }
        with self._turn(device):
            run_builder(job, progress)

    def _timing_cache(self, device: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
        level = options["builder_optimization_level"]  # 0 times nothing
        return str(timing_cache_path(device[self.name], device["name"], level)) if level else None

    @contextmanager
    def _turn(self, device: Mapping[str, Any]) -> Iterator[None]:
        """Waits for what a build must have to itself."""
        with only_builder(_uuid(), device["name"]):
            yield

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

    def memory(self, folders: Sequence[Path], options: Mapping[str, Any], open_buckets: int | None = None) -> Any:
        from toolchain.engines.tensorrt.run import open_memory

        return open_memory(self.library, folders, options, open_buckets)

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: Mapping[str, Any],
        memory: Any,
    ) -> Any:
        from toolchain.engines.tensorrt.run import TensorRtEngine

        return TensorRtEngine(folder, weights, spec, memory)


def advisory(version: str | None) -> str | None:
    """What a user of this version should know about its safety, or None; None too where there is no TensorRT."""
    if version is None or numbers(version) >= SAFE:
        return None
    return (
        f"TensorRT {version} has known code-execution flaws (CVE-2026-24268, CVE-2026-24238, CVE-2026-24272), fixed in "
        f"11.0: {TENSORRT.install} --upgrade"
    )


def _uuid() -> str:
    """Which of several equal GPUs this is, whatever its number in this process."""
    from toolchain.cuda.driver import call

    return bytes(call("cudaGetDeviceProperties", 0).uuid.bytes).hex()
