"""Opening: a plan's validity, runtime configs, kernels that are finished when a context is made, and their cache."""

from __future__ import annotations

import hashlib
import json
import struct
import weakref
from typing import Any

from tensorrt import _context, _engine, _plan
from tensorrt._enums import ExecutionContextAllocationStrategy, _enumeration
from tensorrt._graph import load_proto
from tensorrt._interfaces import Buffer, IHostMemory, ILogger, Reporter, padded, without_device
from tensorrt._rules import Made, violate

from tensorrt_rtx._rules import VERSION, capability, failing

EngineValidity = _enumeration("EngineValidity", VALID=0, SUBOPTIMAL=1, INVALID=2)
EngineInvalidityDiagnostics = _enumeration(
    "EngineInvalidityDiagnostics",
    VERSION_MISMATCH=1,
    UNSUPPORTED_CC=2,
    OLD_CUDA_DRIVER=4,
    OLD_CUDA_RUNTIME=8,
    INSUFFICIENT_GPU_MEMORY=16,
    MALFORMED_ENGINE=32,
    CUDA_ERROR=64,
)
CudaGraphStrategy = _enumeration("CudaGraphStrategy", DISABLED=0, WHOLE_GRAPH_CAPTURE=1)
DynamicShapesKernelSpecializationStrategy = _enumeration(
    "DynamicShapesKernelSpecializationStrategy", LAZY=0, EAGER=1, NONE=2
)
finished: list[str] = []
"""Engines whose kernels were finished in this process, and not found in a cache."""


class Runtime(_engine.Runtime):
    def __init__(self, logger: ILogger) -> None:
        self._report = Reporter(logger)
        without_device(self._report)
        self._host_code = False

    @property
    def engine_header_size(self) -> int:
        return 64

    def get_engine_validity(self, buffer: Buffer) -> tuple[Any, int]:
        header = _header(bytes(memoryview(buffer)))
        bits = 0
        if header is None:
            bits |= int(EngineInvalidityDiagnostics.MALFORMED_ENGINE)
        else:
            if header["version"] != VERSION:
                bits |= int(EngineInvalidityDiagnostics.VERSION_MISMATCH)
            if not _runs_here(header):
                bits |= int(EngineInvalidityDiagnostics.UNSUPPORTED_CC)
        if bits:
            return EngineValidity.INVALID, bits
        return (EngineValidity.SUBOPTIMAL if failing("suboptimal") else EngineValidity.VALID), 0

    def deserialize_cuda_engine(self, serialized_engine: Buffer) -> ICudaEngine | None:
        data = bytes(memoryview(serialized_engine))
        header = _header(data)
        body = data[16 + struct.unpack("<Q", data[8:16])[0] :] if header else b""
        if header is None or hashlib.sha256(body).hexdigest() != header["sha256"] or header["version"] != VERSION:
            return self._report.error("IRuntime::deserializeCudaEngine: Error Code 1: Serialization (corrupt plan)")
        state = {"runtime": weakref.ref(self), "report": self._report, "header": header, "model": load_proto(body)}
        return ICudaEngine._make(executable=None, shapes={}, **state)


class ICudaEngine(_engine.ICudaEngine):
    def create_runtime_config(self) -> IRuntimeConfig:
        config = IRuntimeConfig._make(engine=self, cache=None)
        config._allocation = ExecutionContextAllocationStrategy.STATIC
        config._graphs, config._specialization = (
            CudaGraphStrategy.DISABLED,
            DynamicShapesKernelSpecializationStrategy.LAZY,
        )
        return config

    def create_execution_context(self, strategy: Any = None, runtime_config: Any = None) -> IExecutionContext:
        """Both overloads of the binding."""
        config = runtime_config or (strategy if isinstance(strategy, IRuntimeConfig) else None)
        if config is not None and config._engine is not self:
            violate("a runtime config of another engine")
        if config is not None and config._graphs is not CudaGraphStrategy.DISABLED:
            violate("the library captures CUDA graphs of its own inside of ours")
        key = f"{self.name} {hashlib.sha256(json.dumps(self._header).encode()).hexdigest()[:8]} {capability()}"
        cache = None if config is None else config._cache
        if cache is None or key not in cache._kernels:
            finished.append(key)
        if cache is not None:
            cache._kernels.add(key)
        made = super().create_execution_context(config._allocation if config is not None else strategy)
        return _as(IExecutionContext, made)


class IExecutionContext(_context.IExecutionContext):
    def is_stream_capturable(self, stream: int) -> bool:
        return not failing("not_capturable")


def _as(cls: Any, made: Any) -> Any:
    """The same object as an instance of a class derived from its own."""
    return cls._make(**{name.removeprefix("_"): value for name, value in vars(made).items()})


class IRuntimeConfig(Made):
    def set_execution_context_allocation_strategy(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> None:
        self._allocation = strategy

    def get_execution_context_allocation_strategy(self) -> ExecutionContextAllocationStrategy:
        return self._allocation

    def create_runtime_cache(self) -> IRuntimeCache:
        return IRuntimeCache._make(kernels=set())

    def set_runtime_cache(self, cache: IRuntimeCache | None = None) -> bool:
        self._cache = cache
        return True

    def get_runtime_cache(self) -> IRuntimeCache | None:
        return self._cache

    @property
    def cuda_graph_strategy(self) -> CudaGraphStrategy:
        return self._graphs

    @cuda_graph_strategy.setter
    def cuda_graph_strategy(self, value: CudaGraphStrategy) -> None:
        self._graphs = value

    @property
    def dynamic_shapes_kernel_specialization_strategy(self) -> DynamicShapesKernelSpecializationStrategy:
        return self._specialization

    @dynamic_shapes_kernel_specialization_strategy.setter
    def dynamic_shapes_kernel_specialization_strategy(self, value: DynamicShapesKernelSpecializationStrategy) -> None:
        self._specialization = value


class IRuntimeCache(Made):
    """Kernels by what they are for. A cache of another GPU or version is not taken, and leaves this one as it is."""

    def serialize(self) -> IHostMemory:
        return IHostMemory(padded(json.dumps([VERSION, capability(), sorted(self._kernels)]).encode()))

    def deserialize(self, blob: Buffer) -> bool:
        try:
            version, gpu, kernels = json.loads(bytes(memoryview(blob)))
        except ValueError:
            return False
        if failing("cache_refused") or (version, gpu) != (VERSION, capability()):
            return False
        self._kernels.update(kernels)
        return True

    def reset(self) -> bool:
        self._kernels.clear()
        return True


def _header(data: bytes) -> dict[str, Any] | None:
    if data[: len(_plan.MAGIC)] != _plan.MAGIC or len(data) < 16:
        return None
    (length,) = struct.unpack("<Q", data[8:16])
    try:
        header: dict[str, Any] = json.loads(data[16 : 16 + length])
    except ValueError:
        return None
    return header if "targets" in header else None


def _runs_here(header: dict[str, Any]) -> bool:
    here = int(capability().replace(".", ""))
    return here in header["targets"] if header["targets"] else here >= 80
