# ruff: noqa: F401
"""A stand-in for NVIDIA's `tensorrt` in tests: its names and rules, on host memory, with ONNX Runtime as the engine.

`tests/fakes` goes onto `sys.path` and, for child processes, into PYTHONPATH. The surface is that of 11.4; with
FAKE_TENSORRT_VERSION=10.13.3.9 it is that of 10.13. tests/trt/test_names.py compares it with NVIDIA's bindings.

A broken rule of TensorRT raises AssertionError and is recorded in `violations`. See `_rules` for the variables that
inject failures, `_context` for what an enqueue does.
"""

from __future__ import annotations

from tensorrt._builder import Builder
from tensorrt._config import IBuilderConfig, IOptimizationProfile, ITimingCache
from tensorrt._context import IExecutionContext
from tensorrt._engine import EngineInspector, ICudaEngine, ISerializationConfig, Runtime
from tensorrt._enums import (
    BuilderFlag,
    DataType,
    EngineCapability,
    ErrorCode,
    ErrorCodeTRT,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    LayerInformationFormat,
    LayerType,
    MemoryPoolType,
    NetworkDefinitionCreationFlag,
    OnnxParserFlag,
    PreviewFeature,
    ProfilingVerbosity,
    RuntimePlatform,
    SerializationFlag,
    TensorFormat,
    TensorIOMode,
    TensorLocation,
    TilingOptimizationLevel,
)
from tensorrt._interfaces import (
    Dims,
    IErrorRecorder,
    IHostMemory,
    ILogger,
    IProgressMonitor,
    IStreamWriter,
    Logger,
    Weights,
    nptype,
    volume,
)
from tensorrt._network import ILayer, INetworkDefinition, ITensor, OnnxParser, ParserError
from tensorrt._refit import OnnxParserRefitter, Refitter
from tensorrt._rules import VERSION, violations
from tensorrt._rules import at_least as _at_least

__version__ = VERSION
del VERSION
if _at_least(10, 14):
    from tensorrt._enums import EngineStat
    from tensorrt._network import IAttention, IAttentionBoundaryLayer, IAttentionInputLayer, IAttentionOutputLayer

float32, float16, bfloat16 = DataType.FLOAT, DataType.HALF, DataType.BF16
int8, int32, int64, uint8, fp8 = DataType.INT8, DataType.INT32, DataType.INT64, DataType.UINT8, DataType.FP8
bool = DataType.BOOL
