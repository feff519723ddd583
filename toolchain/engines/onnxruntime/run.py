"""Engines of ONNX Runtime on the CPU, opened: sessions that map their weight files and are launched by I/O binding."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.engines.buffers import HostMemory, check_array
from toolchain.engines.cpu import physical_cores
from toolchain.engines.onnxruntime.device import cpu_device
from toolchain.engines.onnxruntime.package import CPU, EITHER, command, installed, warn_of_clash
from toolchain.engines.onnxruntime.session import CPU_PROVIDER, GRAPH, Provider, open_session, session_options
from toolchain.errors import EngineError
from toolchain.recipe.options import OnnxRuntimeOptions
from toolchain.signature import GraphSpec

log = logging.getLogger("toolchain")


class OnnxRuntimeRunner:
    """`Runner` of the backend `onnxruntime`."""

    name = "onnxruntime"

    def available(self) -> str | None:
        """Why ONNX Runtime cannot run on this CPU, or None."""
        try:
            import onnxruntime
        except ImportError as error:
            return f"onnxruntime cannot be imported: {error} ({EITHER})"
        if CPU_PROVIDER not in onnxruntime.get_available_providers():
            return "this onnxruntime has no CPU execution provider"
        return None

    def refuse(self, built_on: Mapping[str, Any], options: OnnxRuntimeOptions) -> str | None:
        """Why engines of another instruction set or minor version of ONNX Runtime cannot run here, or None."""
        return refuse_device(built_on, cpu_device(), ("kind", "cpu"))

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        """The pip command for the version that built the engines, or None."""
        return install_command(built_on, cpu_device, next(iter(installed()), CPU), ("kind", "cpu"))

    def memory(
        self, folders: Sequence[Path], options: OnnxRuntimeOptions, open_buckets: int | None = None
    ) -> HostMemory:
        """Host memory."""
        return HostMemory()

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: OnnxRuntimeOptions,
        memory: HostMemory,
        *,
        profile: str | None = None,
    ) -> OnnxRuntimeEngine:
        """Opens an engine. Raises EngineError.

        profile  profiles the session's operators into a file whose path begins so: see `OnnxRuntimeEngine.end_profile`
        """
        settings = session_options(options.threads or physical_cores())
        if profile is not None:
            settings.enable_profiling = True
            settings.profile_file_prefix = profile
        return OnnxRuntimeEngine(open_graph(folder, weights, settings, (CPU_PROVIDER,)), spec, folder)


def refuse_device(built_on: Mapping[str, Any], here: Mapping[str, Any], same: Sequence[str]) -> str | None:
    """Why engines cannot run here, or None; the two descriptions of devices must agree in the fields `same`."""
    warn_of_clash()
    for field in same:
        if built_on.get(field) != here[field]:
            return f"built on {built_on.get(field)}, this machine is {here[field]}"
    # Optimised graphs use ONNX Runtime's internal operators, which have no compatibility promise between minors.
    built, ours = (str(device.get("onnxruntime")) for device in (built_on, here))
    if _minor(built) != _minor(ours):
        return f"built with onnxruntime {built}, this machine has {ours}"
    return None


def install_command(
    built_on: Mapping[str, Any], device: Callable[[], Mapping[str, Any]], package: str, same: Sequence[str]
) -> str | None:
    """The command that installs the version of `package` that built the engines; None where it would not open them."""
    built = str(built_on.get("onnxruntime"))
    try:
        here = device()
    except EngineError:
        return command(package, built)
    other_device = any(built_on.get(field) != here[field] for field in same)
    return None if other_device or _minor(built) == _minor(here["onnxruntime"]) else command(package, built)


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def open_graph(folder: Path, weights: Mapping[str, Path], settings: Any, providers: Sequence[Provider]) -> Any:
    """A session over an engine's optimised graph, with its weight files mapped. Raises EngineError."""
    import onnxruntime

    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        graph = (folder / GRAPH).read_bytes()
    except OSError as error:
        raise EngineError("an engine's graph cannot be read", where=folder / GRAPH, got=error) from error
    # The graph comes as bytes so that its weights may lie in a folder of their own, which no path may leave.
    with _within_one_folder(weights, settings) as weight_folder:
        settings.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weight_folder))
        return open_session(graph, settings, folder / GRAPH, providers)


@contextlib.contextmanager
def _within_one_folder(weights: Mapping[str, Path], settings: Any) -> Iterator[Path]:
    """The folder of the weight files, which must lie in it for ONNX Runtime to map them; what is mapped may go then.

    In a snapshot from the hub they are links to files elsewhere. Hard links stand for them while a session is opened;
    where none can be made, on a read-only disk say, ONNX Runtime is given the content and each session copies it.
    """
    folder = weights["weights"].parent
    if not any(path.is_symlink() for path in weights.values()):
        yield folder
        return
    with contextlib.ExitStack() as stack:
        try:
            near = weights["weights"].resolve().parent
            scratch = tempfile.TemporaryDirectory(dir=near, prefix=".diffbuild-", ignore_cleanup_errors=True)
            folder = Path(stack.enter_context(scratch))
            for path in weights.values():
                os.link(path.resolve(), folder / path.name)
        except OSError as error:
            log.warning("no link to a weight file can be made (%s): every engine holds a copy of its weights", error)
            files = {path.name: np.fromfile(path, np.uint8) for path in weights.values()}
            sizes = [data.nbytes for data in files.values()]
            settings.add_external_initializers_from_files_in_memory([*files], [*files.values()], sizes)
        yield folder


class OnnxRuntimeEngine:
    """A session with static shapes, launched through I/O bindings on host memory."""

    def __init__(self, session: Any, spec: GraphSpec, folder: Path) -> None:
        """Takes the session over. Raises EngineError where it has another signature than `spec`."""
        self.spec = spec
        self._session = session
        self._folder = folder
        self._check_signature()

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        """A launch on these arrays. Raises EngineError for one that is missing or does not fit."""
        session = self._session
        binding = session.io_binding()
        for tensor in self.spec.inputs:
            array = check_array(tensor, buffers.get(tensor.name), self._folder)
            binding.bind_input(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        for tensor in self.spec.outputs:
            if tensor.name in buffers:
                array = check_array(tensor, buffers[tensor.name], self._folder)
                binding.bind_output(tensor.name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
        kept = dict(buffers)  # the binding holds bare addresses

        def launch() -> None:
            assert kept is not None
            session.run_with_iobinding(binding)

        return launch

    def end_profile(self) -> Path:
        """Ends the profile that opening began and returns its file: ONNX Runtime's JSON, with all launches so far."""
        return Path(self._session.end_profiling())

    def close(self) -> None:
        """Lets the session go."""
        self._session = None

    def _check_signature(self) -> None:
        for side, tensors in (("inputs", self.spec.inputs), ("outputs", self.spec.outputs)):
            nodes = getattr(self._session, f"get_{side}")()
            got = [(n.name, tuple(n.shape)) for n in nodes]
            expected = [(t.name, t.shape) for t in tensors]
            if got != expected:
                raise EngineError(
                    f"the engine has other {side} than its manifest says",
                    where=self._folder,
                    expected=expected,
                    got=got,
                )
