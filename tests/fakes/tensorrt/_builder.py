"""Building: progress, the timing cache, the failures of the real builder, and at the end a plan."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

from tensorrt import _plan
from tensorrt._config import IBuilderConfig, IOptimizationProfile
from tensorrt._enums import BuilderFlag, DataType, ErrorCodeTRT, MemoryPoolType, NetworkDefinitionCreationFlag, Severity
from tensorrt._graph import Executable
from tensorrt._interfaces import (
    IErrorRecorder,
    IHostMemory,
    ILogger,
    IProgressMonitor,
    IStreamWriter,
    Reporter,
    initialised,
    without_device,
)
from tensorrt._network import INetworkDefinition
from tensorrt._rules import Native, at_least, failing, violate

WEAK_FLAGS = ("FP16", "BF16", "INT8", "FP8", "INT4", "FP4")
OUT_OF_MEMORY = (
    (Severity.ERROR, "[defaultAllocator.cpp::allocate::62] Error Code 1: Cuda Runtime (In allocate at "
     "common/dispatch/defaultAllocator.cpp:62: out of memory)"),
    (Severity.WARNING, "Requested amount of GPU memory (34359738368 bytes) could not be allocated. There may not be "
     "enough free memory for allocation to succeed."),
    (Severity.ERROR, "[virtualMemoryBuffer.cpp::resizePhysical::145] Error Code 2: OutOfMemory (Requested size was "
     "34359738368 bytes.)"),
    (Severity.ERROR, "IBuilder::buildSerializedNetwork: Error Code 10: Internal Error (Could not find any "
     "implementation for node {ForeignNode[...]}.)"),
)  # fmt: skip


class CancelledError(Exception):
    pass


class _Progress:
    """Reports from a thread of its own, as the builder does. What a monitor raises is printed, not raised.

    So is an answer that pybind11 cannot take for a bool, such as a string; both cancel.
    """

    def __init__(self, monitor: IProgressMonitor | None) -> None:
        self._monitor = monitor

    def _call(self, method: str, *args: Any) -> Any:
        answer: list[Any] = [None]

        def run() -> None:
            try:
                answer[0] = getattr(self._monitor, method)(*args)
            except BaseException:
                traceback.print_exc()

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        return answer[0]

    def phase(self, name: str, parent: str | None, steps: int, work: Callable[[int], None]) -> None:
        if self._monitor:
            self._call("phase_start", name, parent, steps)
        try:
            for step in range(steps):
                work(step)
                if self._monitor and not self._goes_on(name, step):
                    raise CancelledError
        finally:
            if self._monitor:
                self._call("phase_finish", name)

    def _goes_on(self, name: str, step: int) -> bool:
        answer = self._call("step_complete", name, step)
        if answer is not None and not hasattr(type(answer), "__bool__"):
            print(f"[ERROR] Exception caught in step_complete(): Unable to cast {type(answer)}", file=sys.stderr)
            return False
        return bool(answer)


class Builder(Native):
    def __init__(self, logger: ILogger) -> None:
        self._report = Reporter(logger)
        without_device(self._report)
        self._max_threads = 1

    @property
    def logger(self) -> ILogger:
        return self._report.logger

    @property
    def error_recorder(self) -> IErrorRecorder:
        return self._report.recorder

    @error_recorder.setter
    def error_recorder(self, value: IErrorRecorder | None) -> None:
        self._report.recorder = value

    @property
    def max_threads(self) -> int:
        return self._max_threads

    @max_threads.setter
    def max_threads(self, value: int) -> None:
        self._max_threads = int(value)

    def create_network(self, flags: int = 0) -> INetworkDefinition:
        empty: dict[str, list[Any]] = {"layers": [], "inputs": [], "outputs": [], "attentions": []}
        flags |= 1 << int(NetworkDefinitionCreationFlag.STRONGLY_TYPED) if at_least(11) else 0
        return INetworkDefinition._make(flags=int(flags), name="Unnamed Network 0", model=None, **empty)

    def create_builder_config(self) -> IBuilderConfig:
        config = IBuilderConfig._make(report=self._report)
        config._set_defaults()
        return config

    def create_optimization_profile(self) -> IOptimizationProfile:
        return IOptimizationProfile._make(shapes={}, extra_memory_target=1.0, report=self._report)

    def reset(self) -> None:
        pass

    def build_serialized_network(self, network: INetworkDefinition, config: IBuilderConfig) -> IHostMemory:
        """None on every failure, with the reason in the log."""
        try:
            plan = self._build(network, config)
        except CancelledError:
            return self._report.error(
                "IBuilder::buildSerializedNetwork: Error Code 7: BuildCanceled (Build canceled by user)"
            )
        return None if plan is None else IHostMemory(plan)

    def build_serialized_network_to_stream(
        self, network: INetworkDefinition, config: IBuilderConfig, writer: IStreamWriter
    ) -> bool:
        """False where there is no plan. True where a writer fails: its exceptions are printed, its answers ignored."""
        initialised(writer)
        plan = self.build_serialized_network(network, config)
        if plan is None:
            return False
        try:
            writer.write(bytes(memoryview(plan)))
        except BaseException as error:
            print(f"[ERROR] Exception caught in write(): {error}", file=sys.stderr)
        return True

    def _build(self, network: INetworkDefinition, config: IBuilderConfig) -> bytes | None:
        why = self._refuses(network, config)
        if why:
            return self._report.error(
                f"IBuilder::buildSerializedNetwork: Error Code 4: {why}", ErrorCodeTRT.INVALID_CONFIG
            )
        progress = _Progress(config.progress_monitor)
        model = network._read_weights()
        layers = [layer for layer in network._layers if layer._type.name != "CONSTANT"]
        entries = {_entry(layer) for layer in layers}

        def top(step: int) -> None:
            if step == 1:
                progress.phase("Tactic selection", "Building engine", max(1, len(layers)), tactics)

        def tactics(step: int) -> None:
            time.sleep(0.2 if failing("slow") else 0)
            if step == len(layers) // 2:
                self._fail_in_the_middle()

        progress.phase("Building engine", None, 3, top)
        if failing("out_of_memory"):
            for severity, text in OUT_OF_MEMORY:
                self._report(severity, text, ErrorCodeTRT.FAILED_ALLOCATION)
            return None
        if failing("build_none"):
            return None
        if config._cache is not None and config.builder_optimization_level > 0:
            missing = entries - config._cache._entries
            if missing and config.get_flag(BuilderFlag.ERROR_ON_TIMING_CACHE_MISS):
                return self._report.error(f"{len(missing)} layers are not in the timing cache")
            self._report(Severity.VERBOSE, f"timing cache: {len(entries) - len(missing)} hits, {len(missing)} misses")
            config._cache._entries |= entries
        return self._serialize(network, config, model, layers)

    def _refuses(self, network: INetworkDefinition, config: IBuilderConfig) -> str | None:
        if network._model is None:
            return "API Usage Error (Network must have at least one output)"
        for attention in network._attentions:
            if not attention._decomposable and not attention._fuses():
                return f"Internal Error (no fused kernel for the attention {attention._name}, and not decomposable)"
        if not at_least(11) and network._strongly_typed():
            asked = [n for n in WEAK_FLAGS if config.get_flag(BuilderFlag[n])]
            if asked:
                return f"API Usage Error (precision flags {asked} on a strongly typed network)"
        for tensor in network._inputs:
            if -1 in tensor._shape:
                if not config._profiles:
                    return "Network has dynamic or shape inputs, but no optimization profile has been defined."
                for number, profile in enumerate(config._profiles):
                    why = _misfit(tensor, profile._shapes.get(tensor._name), number)
                    if why:
                        return f"API Usage Error ({why})"
        return None

    def _fail_in_the_middle(self) -> None:
        """A crash, or a build that never ends: blocked signals reach other threads, as those of native code would."""
        if failing("kill_child"):
            os.kill(os.getpid(), signal.SIGKILL)
        if failing("hang"):
            self._report(Severity.INFO, "the fake's build hangs now")
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
            time.sleep(600)
            violate("a build that hangs was waited for")

    def _serialize(self, network: INetworkDefinition, config: IBuilderConfig, model: Any, layers: list[Any]) -> bytes:
        Executable(_copy(model))  # a graph that does not run is a failed build and not a bad plan
        stripped = config.get_flag(BuilderFlag.STRIP_PLAN)
        floats = failing("fp32_engine") or not network._strongly_typed()
        weights = _plan.strip(model) if stripped else {}
        total = sum(w["nbytes"] for w in weights.values())
        refit = [n for n in ("REFIT", "REFIT_IDENTICAL", "REFIT_INDIVIDUAL") if config.get_flag(BuilderFlag[n])]
        header = {
            "name": network._name,
            "inputs": [_describe(t, False) for t in network._inputs],
            "outputs": [_describe(t, False) for t in network._outputs],
            "layers": [_layer(layer, floats) for layer in layers],
            "verbosity": config.profiling_verbosity.name,
            "compatibility": config.hardware_compatibility_level.name,
            "profiles": [p._shapes for p in config._profiles] or [{}],
            "memory": 256 * (1 + len(layers) % 64),
            "aux_streams": max(0, config.max_aux_streams),
            "stripped": total if stripped else -1,
            "weights": weights,
            "version_compatible": config.get_flag(BuilderFlag.VERSION_COMPATIBLE),
            "lean_runtime": not config.get_flag(BuilderFlag.EXCLUDE_LEAN_RUNTIME),
            "refit": "REFIT_IDENTICAL" if stripped and not refit else "".join(refit),
            "workspace": config.get_memory_pool_limit(MemoryPoolType.WORKSPACE),
        }
        return _plan.write(header, model)


def _misfit(tensor: Any, shapes: list[tuple[int, ...]] | None, number: int) -> str | None:
    """Why a profile does not fit a dynamic input."""
    if shapes is None:
        return f"Dynamic input tensor {tensor._name} is missing dimensions in profile {number}."
    for axis, size in enumerate(tensor._shape):
        asked = [shape[axis] for shape in shapes if len(shape) == len(tensor._shape)]
        if len(asked) < 3 or (size != -1 and set(asked) != {size}):
            return f"Dimension mismatch for tensor {tensor._name} and profile {number}. At dimension axis {axis}"
    return None


def _copy(model: Any) -> Any:
    copy = type(model)()
    copy.CopyFrom(model)
    return copy


def _entry(layer: Any) -> str:
    shapes = [(t._dtype.name, t._shape) for t in (*layer._inputs, *layer._outputs)]
    return f"{layer._node.op_type} {shapes}"


def _describe(tensor: Any, floats: bool) -> dict[str, Any]:
    half = tensor._dtype in (DataType.HALF, DataType.BF16)
    dtype = DataType.FLOAT if floats and half else tensor._dtype
    return {"name": tensor._name, "dtype": dtype.name, "shape": list(tensor._shape)}


def _layer(layer: Any, floats: bool) -> dict[str, Any]:
    return {
        "name": layer._name,
        "type": layer._type.name,
        "inputs": [_describe(t, floats) for t in layer._inputs],
        "outputs": [_describe(t, floats) for t in layer._outputs],
    }
