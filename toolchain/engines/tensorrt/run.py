"""Engines of TensorRT, run: whether they can, and how they are opened."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from toolchain.engines.tensorrt.device import DOCTOR, gpu_device
from toolchain.engines.tensorrt.library import TENSORRT, Library, numbers
from toolchain.errors import EngineError
from toolchain.recipe.options import TensorRtOptions, TensorRtRtxOptions
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from toolchain.engines.tensorrt.engine import TensorRtEngine, TensorRtMemory

AMPERE = (8, 0)
"""Compute capability."""
SAFE = (11,)
"""The first version without known flaws."""
Options = TypeVar("Options", TensorRtOptions, TensorRtRtxOptions)


class PlanRunner(Generic[Options]):
    """What the runners of TensorRT and of TensorRT for RTX have in common."""

    name: str
    library: Library

    def available(self) -> str | None:
        """Why the library cannot run on a GPU here, or None."""
        try:
            gpu_device(self.library)
        except EngineError as error:
            text = f"{error.what}: {error.got}" if error.got else error.what
            text += f", expected {error.expected}" if error.expected else ""
            return text if error.hint in (None, DOCTOR) else f"{text} ({error.hint})"
        return None

    def refuse(self, built_on: Mapping[str, Any], options: Options) -> str | None:
        """Why engines of another version, or compiled for another GPU, cannot run here, or None."""
        here = gpu_device(self.library)
        if built_on.get("kind") != here["kind"]:
            return f"built on {built_on.get('kind')}, this machine is {here['kind']}"
        built, ours = str(built_on.get(self.name)), here[self.name]
        if built != ours:
            title = self.library.title
            return f"built with {title} {built}, this machine has {ours}, and the engines need that version"
        return self._refuse_gpu(built_on, here, options)

    def _refuse_gpu(self, built_on: Mapping[str, Any], here: Mapping[str, Any], options: Options) -> str | None:
        """Why kernels of one GPU cannot run on another, or None."""
        raise NotImplementedError

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        """The pip command for the version that built the engines, or None."""
        built = built_on.get(self.name)
        return None if built is None or built == self.library.installed() else self.library.exactly(str(built))

    def memory(self, folders: Sequence[Path], options: Options, open_buckets: int | None = None) -> TensorRtMemory:
        """GPU memory, in which engines share one block for activations. Warns where they will not fit. EngineError."""
        from toolchain.engines.tensorrt.engine import open_memory

        specialization = options.kernel_specialization if isinstance(options, TensorRtRtxOptions) else "eager"
        return open_memory(self.library, folders, options.cuda_graph, open_buckets, specialization)

    def open(
        self, folder: Path, weights: Mapping[str, Path], spec: GraphSpec, options: Options, memory: TensorRtMemory
    ) -> TensorRtEngine:
        """Opens a plan for the bucket of `spec`, or joins those who have it open. Raises EngineError."""
        from toolchain.engines.tensorrt.engine import TensorRtEngine

        return TensorRtEngine(folder, weights, spec, memory)


class TensorRtRunner(PlanRunner[TensorRtOptions]):
    """`Runner` of the backend `tensorrt`."""

    name = "tensorrt"
    library: Library = TENSORRT

    def _refuse_gpu(self, built_on: Mapping[str, Any], here: Mapping[str, Any], options: TensorRtOptions) -> str | None:
        theirs, ours = str(built_on.get("compute_capability")), str(here["compute_capability"])
        if options.hardware_compatibility_level == "ampere_plus":
            fits, needs = numbers(theirs) >= AMPERE <= numbers(ours), "compute capability 8.0 or newer"
        elif options.hardware_compatibility_level == "same_compute_capability":
            fits, needs = theirs == ours, f"compute capability {theirs}"
        else:
            names = ("name", "compute_capability", "sm_count")
            fits, needs = all(built_on.get(n) == here.get(n) for n in names), "that very GPU"
        if fits:
            return None
        facts = ((d.get("name"), d.get("compute_capability"), d.get("sm_count")) for d in (built_on, here))
        first, second = (f"{name} (compute capability {cc}, {count} multiprocessors)" for name, cc, count in facts)
        return f"built on {first}, this machine has {second}, and the engines need {needs}"


def advisory(version: str | None) -> str | None:
    """What a user of this version should know about its safety, or None; None too where there is no TensorRT."""
    if version is None or numbers(version) >= SAFE:
        return None
    return (
        f"TensorRT {version} has known code-execution flaws (CVE-2026-24268, CVE-2026-24238, CVE-2026-24272), fixed in "
        f"11.0: {TENSORRT.install} --upgrade"
    )
