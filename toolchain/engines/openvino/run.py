"""Engines of OpenVINO, opened: compiled models over mapped weight files, launched on the runtime's own buffers."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.engines.buffers import HostMemory, check_array
from toolchain.engines.openvino.compiled import BLOB, BLOB_DIGEST, WEIGHT_BYTES, explained, settings
from toolchain.engines.openvino.device import EXTRA, core, has_device, missing_device, openvino_device
from toolchain.errors import EngineError
from toolchain.recipe.options import OpenVinoOptions
from toolchain.signature import GraphSpec
from toolchain.store.facts import ENGINE_FACTS, read_facts


class OpenVinoRunner:
    """`Runner` of the backend `openvino`."""

    name = "openvino"

    def available(self) -> str | None:
        """Why OpenVINO cannot run here, or None."""
        try:
            core()
        except EngineError as error:
            return f"{error.what}{f': {error.got}' if error.got else ''} ({EXTRA})"
        return None

    def refuse(self, built_on: Mapping[str, Any], options: OpenVinoOptions) -> str | None:
        """Why engines of another version of OpenVINO or for another device cannot run here, or None."""
        here, kind = openvino_device(), options.device.lower()
        if not has_device(options.device):
            return f"OpenVINO finds no {options.device} here (only {', '.join(core().available_devices)})"
        for field in ("openvino", kind):
            if built_on.get(field) != here[field]:
                what = "with openvino" if field == "openvino" else "on"
                return f"built {what} {built_on.get(field)}, this machine has {here[field]}"
        return None

    def install(self, built_on: Mapping[str, Any]) -> str | None:
        """The pip command for the version that built the engines; None where that would not open them."""
        built = built_on.get("openvino")
        try:
            here = openvino_device()
        except EngineError:
            return f"pip install openvino=={built}"
        other = built is not None and here["openvino"] != built and here["cpu"] == built_on.get("cpu")
        return f"pip install openvino=={built}" if other else None

    def memory(self, folders: Sequence[Path], options: OpenVinoOptions, open_buckets: int | None = None) -> HostMemory:
        """Host memory."""
        return HostMemory()

    def open(
        self,
        folder: Path,
        weights: Mapping[str, Path],
        spec: GraphSpec,
        options: OpenVinoOptions,
        memory: HostMemory,
        *,
        profile: bool = False,
    ) -> OpenVinoEngine:
        """Opens an engine; with `profile` its launches are timed by operator. Raises EngineError."""
        if not has_device(options.device):
            raise missing_device(options.device)
        blob = _checked_blob(folder, weights["weights"])
        properties = settings(options) | {"WEIGHTS_PATH": str(weights["weights"].resolve())}
        properties |= {"PERF_COUNT": "YES"} if profile else {}
        try:
            compiled = core().import_model(blob, options.device, properties)
        except RuntimeError as error:
            raise EngineError(
                "OpenVINO cannot open the engine",
                where=folder,
                got=explained(error),
                hint="build the bundle again on this machine, from the same recipe",
            ) from error
        return OpenVinoEngine(compiled, spec, folder)


def _checked_blob(folder: Path, weights: Path) -> bytes:
    """An exported model, as it was built. EngineError otherwise: OpenVINO reads past the end of what was cut off."""
    facts, path = read_facts(folder / ENGINE_FACTS), folder / BLOB
    hint = "build the bundle again, or copy it again from where it is whole"
    try:
        size, blob = weights.stat().st_size, path.read_bytes()
    except OSError as error:
        raise EngineError("an engine's file cannot be read", where=folder, got=error, hint=hint) from error
    if BLOB_DIGEST not in facts:
        what = "an engine's facts are missing or cannot be read"
        raise EngineError(what, where=folder / ENGINE_FACTS, expected=BLOB_DIGEST, hint=hint)
    digest = hashlib.sha256(blob).hexdigest()
    if digest != facts[BLOB_DIGEST]:
        expected = f"sha256 {facts[BLOB_DIGEST]}"
        raise EngineError("an engine is not as it was built", where=path, expected=expected, got=digest, hint=hint)
    if size != facts.get(WEIGHT_BYTES):
        expected, got = f"{facts.get(WEIGHT_BYTES)} bytes", f"{size} bytes"
        raise EngineError("a weight file is not the engine's", where=weights, expected=expected, got=got, hint=hint)
    return blob


@dataclass(frozen=True)
class MeanTime:
    """How long one operator took, in the mean over all launches of its engine since that was opened."""

    name: str
    kind: str
    mean_us: float
    shapes: str


class OpenVinoEngine:
    """A compiled model with static shapes, launched through requests on host memory."""

    def __init__(self, compiled: Any, spec: GraphSpec, folder: Path) -> None:
        """Takes the model over. Raises EngineError where it has another signature than `spec`."""
        self.spec = spec
        self._compiled = compiled
        self._folder = folder
        self._requests: list[Any] = []
        self._check_signature()

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        """A launch on these arrays. Raises EngineError for one that is missing or does not fit."""
        import openvino

        request = self._compiled.create_infer_request()
        for tensor in self.spec.inputs:
            array = check_array(tensor, buffers.get(tensor.name), self._folder)
            request.set_tensor(tensor.name, openvino.Tensor(array, shared_memory=True))
        for tensor in self.spec.outputs:
            if tensor.name in buffers:
                array = check_array(tensor, buffers[tensor.name], self._folder)
                request.set_tensor(tensor.name, openvino.Tensor(array, shared_memory=True))
        self._requests.append(request)

        def launch() -> None:
            request.start_async()  # not `infer`, which takes inputs and collects outputs into a dictionary
            request.wait()

        return launch

    def mean_times(self) -> list[MeanTime]:
        """Of an engine that was opened with `profile` and bound: the operators in the order in which they run.

        OpenVINO keeps the mean of each on a CPU, in whole microseconds, and no times of a single launch.
        """
        import openvino

        shapes = {op.get_friendly_name(): _shapes(op) for op in self._compiled.get_runtime_model().get_ops()}
        return [
            MeanTime(o.node_name, o.node_type, o.real_time.total_seconds() * 1e6, shapes.get(o.node_name, ""))
            for o in self._requests[-1].profiling_info
            if o.status == openvino.ProfilingInfo.Status.EXECUTED
        ]

    def close(self) -> None:
        """Frees the model and its requests."""
        self._requests = []
        self._compiled = None

    def _check_signature(self) -> None:
        for side, tensors in (("inputs", self.spec.inputs), ("outputs", self.spec.outputs)):
            ports = getattr(self._compiled, side)
            names = [next((t.name for t in tensors if t.name in p.names), p.any_name) for p in ports]  # of several
            dtypes = [str(np.dtype(p.element_type.to_dtype())) for p in ports]
            got = [(name, dtype, tuple(p.shape)) for name, dtype, p in zip(names, dtypes, ports, strict=True)]
            expected = [(t.name, t.dtype, t.shape) for t in tensors]
            if sorted(got) != sorted(expected):
                raise EngineError(
                    f"the engine has other {side} than its manifest says",
                    where=self._folder,
                    expected=expected,
                    got=got,
                )


def _shapes(operator: Any) -> str:
    """Types and shapes of what goes in and comes out, such as "f32[2x4] -> bf16[2x8]"."""
    return " -> ".join(", ".join(map(_shape, ports)) for ports in (operator.inputs(), operator.outputs()))


def _shape(port: Any) -> str:
    return f"{port.get_element_type().get_type_name()}[{'x'.join(map(str, port.get_shape()))}]"
