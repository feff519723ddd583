"""What a backend is, and an engine that it opened.

A backend turns a graph into files at build time and opens those files at run time. Building imports onnx_ir; opening
needs nothing but numpy and the backend's own library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from toolchain.engines.buffers import Buffer, Memory
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir

Buffers = Mapping[str, Buffer]


class Engine(Protocol):
    """An opened engine. Not safe for concurrent launches."""

    spec: GraphSpec

    def bind(self, buffers: Buffers) -> Callable[[], None]:
        """Fixes every input and output to a buffer of the engine's memory and returns the launch.

        A launch allocates nothing, and on a GPU only enqueues.

        One engine can hold several bindings: the denoising loop swaps two, so that no state is copied. Outputs that
        are not given are not delivered. Raises EngineError for a missing buffer or one of another dtype or shape.
        """

    def close(self) -> None:
        """Frees the engine; its launches must not be called any more."""


class Backend(Protocol):
    """A backend. What it calls `options` is its table of the recipe.

    dtypes       those that it can run a whole component in
    run_options  options that change how an engine runs and not what is built: no part of its key
    """

    name: str
    dtypes: tuple[str, ...]
    run_options: tuple[str, ...]

    def available(self) -> str | None:
        """Why the backend cannot run here, or None."""

    def device(self) -> dict[str, Any]:
        """What engines built here are tied to; part of every engine's key and of the bundle. Raises EngineError where
        nothing can be built."""

    def refuse(self, built_on: Mapping[str, Any], options: Mapping[str, Any]) -> str | None:
        """Why engines built on the described device with these options cannot run here, or None. Only asked where the
        backend is available."""

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        """The command that brings the library that engines of the described device need; None where it is here
        already, or where that would not open them."""

    def problems(self, options: Mapping[str, Any]) -> list[str]:
        """What the library at hand, if there is one, cannot build under these options, each "option: reason"."""

    def prepare(self, graph: ir.Model) -> ir.Model:
        """An exported graph in the form that `build` takes, with weights as this backend wants them."""

    def merges(self, options: Mapping[str, Any]) -> bool:
        """Whether one engine serves all buckets of a component under these options, built from their merged graph."""

    def reads_weights(self, options: Mapping[str, Any]) -> bool:
        """Whether engines are opened with their component's weight files, which a bundle then holds."""

    def packs(self, options: Mapping[str, Any]) -> bool:
        """Whether `pack` has anything to do under these options."""

    def pack(self, graph: Path, weights: Mapping[str, Path], out: Path, options: Mapping[str, Any]) -> None:
        """Writes `packed.safetensors` into `out`: weights in the backend's own layout, shared by all buckets."""

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: Mapping[str, Any],
        progress: Callable[[str, float | None], None] = lambda phase, share: None,
    ) -> None:
        """Writes the engine's files into the folder `out`.

        `weights` is role -> file: "weights" is the component's weight file, "packed" the backend's. `progress` gets the
        name of a phase and how much of it is done, 0 to 1, or None where nobody can tell; what it raises cancels the
        build. Raises EngineError.
        """

    def memory(self, folders: Sequence[Path], options: Mapping[str, Any], open_buckets: int | None = None) -> Memory:
        """Where the buffers of one pipeline will lie, for the engines in `folders`, of which each component has
        `open_buckets` open at once, None: all. Raises EngineError."""

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: Mapping[str, Any],
        memory: Any,
    ) -> Engine:
        """Opens an engine from its folder and its component's weight files, for buffers of `memory`, which is one of
        this backend's own. Raises EngineError."""
