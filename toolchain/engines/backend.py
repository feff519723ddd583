"""What a backend is: a builder, which turns graphs into engine files, and a runner, which opens and launches them.

The two sides of a backend lie in different modules that import nothing of each other: what only runs engines is no
part of their keys. Building imports onnx_ir; running needs nothing but numpy and the backend's own library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from toolchain.engines.buffers import Buffer, Memory
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.recipe import Quantize

Buffers = Mapping[str, Buffer]
Weights = Mapping[str, Path]
"""Role -> weight file: "weights" is the component's own, "packed" what `Builder.packer` wrote."""
Pack = Callable[[Path, Weights, Path], None]
"""Called with a graph, its weight files and an output folder, in which it writes `packed.safetensors`."""
Progress = Callable[[str, float | None], None]
"""Called with the name of a phase and the share of it that is done, 0 to 1, or None where it is unknown."""
Options = TypeVar("Options", contravariant=True)
"""A backend's table of the recipe: one of the dataclasses of `toolchain.recipe.options`."""


class Builder(Protocol[Options]):
    """The build side of a backend.

    dtypes       element types in which it can run a whole component, on some device
    run_options  options that change how an engine runs and not what is built: not part of its key
    """

    name: str
    dtypes: tuple[str, ...]
    run_options: tuple[str, ...]

    def device(self) -> dict[str, Any]:
        """What engines built here are tied to; part of every engine's key and of the bundle. Raises EngineError where
        nothing can be built."""

    def problems(self, options: Options) -> list[str]:
        """What the installed library, if there is one, cannot build under these options, each "option: reason"."""

    def refuses_dtype(self, dtype: str, options: Options) -> str | None:
        """Why the device of these options cannot compute in one of `dtypes`, or None."""

    def refuses_quantized(self, quantize: Quantize, options: Options) -> str | None:
        """Why a component cannot be quantised so under these options, and what can; None where it can."""

    def warning(self, quantize: Quantize) -> str | None:
        """What goes worse on this machine than a recipe expects of a component that is quantised so, or None."""

    def prepare(self, graph: ir.Model) -> ir.Model:
        """An exported graph in the form that `build` takes, with weights as this backend wants them."""

    def finish(self, graph: ir.Model) -> ir.Model:
        """What `prepare` gave, quantised where it is, with better operators where the backend has some."""

    def merges(self, options: Options) -> bool:
        """Whether one engine serves all buckets of a component under these options, built from their merged graph."""

    def reads_weights(self, options: Options) -> bool:
        """Whether engines are opened with their component's weight files, which a bundle then holds."""

    def packer(self, options: Options) -> Pack | None:
        """Writes weights in the backend's own layout, which all buckets share; None where nothing is packed."""

    def build(
        self,
        graph: Path,
        weights: Weights,
        out: Path,
        options: Options,
        progress: Progress = lambda phase, share: None,
    ) -> None:
        """Writes the engine's files into the folder `out`. An exception raised by `progress` cancels the build.

        Raises EngineError and WeightsError.
        """


class Engine(Protocol):
    """An opened engine. Not safe for concurrent launches."""

    spec: GraphSpec

    def bind(self, buffers: Buffers) -> Callable[[], None]:
        """Fixes every input and output to a buffer of the engine's memory and returns the launch.

        A launch allocates nothing, and on a GPU only enqueues.

        One engine can hold several bindings: the denoising loop has two, with ping-pong buffers for the state, so that
        none is copied. Outputs that are not given are not delivered. Raises EngineError for a missing buffer or one of
        another dtype or shape.
        """

    def close(self) -> None:
        """Frees the engine; its launches must not be called any more."""


class Runner(Protocol[Options]):
    """The run side of a backend."""

    name: str

    def available(self) -> str | None:
        """Why the backend cannot run here, or None."""

    def refuse(self, built_on: Mapping[str, Any], options: Options) -> str | None:
        """Why engines built on the described device with these options cannot run here, or None. Only asked where the
        backend is available."""

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        """The command that installs the library that engines of the described device need; None where it is installed
        already, or where that would not open them."""

    def memory(self, folders: Sequence[Path], options: Options, open_buckets: int | None = None) -> Memory:
        """Memory for the buffers of one pipeline over the engines in `folders`, of which each component has
        `open_buckets` open at once, None: all. Raises EngineError."""

    def open(self, folder: Path, weights: Weights, spec: GraphSpec, options: Options, memory: Any) -> Engine:
        """Opens an engine from its folder and its component's weight files. `memory` was made by this runner, and will
        hold the buffers. Raises EngineError."""
