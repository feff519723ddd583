"""The enumerations, with the members and values of the binding (11.4; where they differ, those of 10.13)."""

from __future__ import annotations

import enum
from typing import Any

from tensorrt._rules import at_least


class Enumeration(enum.Enum):
    """As pybind11's: comparable to its own kind alone, int() only when asked."""

    def __int__(self) -> int:
        return int(self.value)

    __index__ = __int__


def _enumeration(name: str, **members: int) -> Any:
    return Enumeration(name, members, module="tensorrt")


class Severity(Enumeration):
    """The one enumeration that the binding orders."""

    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2
    INFO = 3
    VERBOSE = 4

    def _order(self, other: Any) -> tuple[int, int]:
        if not isinstance(other, Severity):
            raise TypeError("Expected an enumeration of matching type!")
        return int(self), int(other)

    def __lt__(self, other: Any) -> bool:
        a, b = self._order(other)
        return a < b

    def __le__(self, other: Any) -> bool:
        a, b = self._order(other)
        return a <= b

    def __gt__(self, other: Any) -> bool:
        a, b = self._order(other)
        return a > b

    def __ge__(self, other: Any) -> bool:
        a, b = self._order(other)
        return a >= b


class DataType(Enumeration):
    FLOAT = 0
    HALF = 1
    BF16 = 7
    INT8 = 2
    INT32 = 3
    INT64 = 8
    BOOL = 4
    UINT8 = 5
    FP8 = 6
    INT4 = 9
    FP4 = 10
    E8M0 = 11

    @property
    def itemsize(self) -> float:
        sizes = {"FLOAT": 4, "INT32": 4, "INT64": 8, "HALF": 2, "BF16": 2, "INT4": 0.5, "FP4": 0.5}
        return sizes.get(self.name, 1)


_FLAGS_11 = {
    "DEBUG": 2, "GPU_FALLBACK": 3, "REFIT": 4, "DISABLE_TIMING_CACHE": 5, "EDITABLE_TIMING_CACHE": 26, "TF32": 6,
    "SPARSE_WEIGHTS": 7, "SAFETY_SCOPE": 8, "DIRECT_IO": 11, "VERSION_COMPATIBLE": 12, "EXCLUDE_LEAN_RUNTIME": 13,
    "ERROR_ON_TIMING_CACHE_MISS": 15, "DISABLE_COMPILATION_CACHE": 17, "STRIP_PLAN": 18, "REFIT_IDENTICAL": 19,
    "WEIGHT_STREAMING": 20, "REFIT_INDIVIDUAL": 22, "STRICT_NANS": 23, "MONITOR_MEMORY": 24,
    "DISTRIBUTIVE_INDEPENDENCE": 27,
}  # fmt: skip
_FLAGS_10 = {
    "FP16": 0, "BF16": 17, "INT8": 1, "DEBUG": 2, "GPU_FALLBACK": 3, "REFIT": 4, "DISABLE_TIMING_CACHE": 5,
    "EDITABLE_TIMING_CACHE": 27, "TF32": 6, "SPARSE_WEIGHTS": 7, "SAFETY_SCOPE": 8, "OBEY_PRECISION_CONSTRAINTS": 9,
    "PREFER_PRECISION_CONSTRAINTS": 10, "DIRECT_IO": 11, "REJECT_EMPTY_ALGORITHMS": 12, "VERSION_COMPATIBLE": 13,
    "EXCLUDE_LEAN_RUNTIME": 14, "FP8": 15, "ERROR_ON_TIMING_CACHE_MISS": 16, "DISABLE_COMPILATION_CACHE": 18,
    "STRIP_PLAN": 19, "WEIGHTLESS": 19, "REFIT_IDENTICAL": 20, "WEIGHT_STREAMING": 21, "INT4": 22,
    "REFIT_INDIVIDUAL": 23, "STRICT_NANS": 24, "MONITOR_MEMORY": 25, "FP4": 26, "DISTRIBUTIVE_INDEPENDENCE": 28,
}  # fmt: skip
_LAYERS = {
    "CONVOLUTION": 0, "CAST": 1, "ACTIVATION": 2, "POOLING": 3, "LRN": 4, "SCALE": 5, "SOFTMAX": 6, "DECONVOLUTION": 7,
    "CONCATENATION": 8, "ELEMENTWISE": 9, "PLUGIN": 10, "UNARY": 11, "PADDING": 12, "SHUFFLE": 13, "REDUCE": 14,
    "TOPK": 15, "GATHER": 16, "MATRIX_MULTIPLY": 17, "RAGGED_SOFTMAX": 18, "CONSTANT": 19, "IDENTITY": 20,
    "PLUGIN_V2": 21, "SLICE": 22, "SHAPE": 23, "PARAMETRIC_RELU": 24, "RESIZE": 25, "TRIP_LIMIT": 26, "RECURRENCE": 27,
    "ITERATOR": 28, "LOOP_OUTPUT": 29, "SELECT": 30, "FILL": 31, "QUANTIZE": 32, "DEQUANTIZE": 33, "CONDITION": 34,
    "CONDITIONAL_INPUT": 35, "CONDITIONAL_OUTPUT": 36, "SCATTER": 37, "EINSUM": 38, "ASSERTION": 39, "ONE_HOT": 40,
    "NON_ZERO": 41, "GRID_SAMPLE": 42, "NMS": 43, "REVERSE_SEQUENCE": 44, "NORMALIZATION": 45, "PLUGIN_V3": 46,
    "SQUEEZE": 47, "UNSQUEEZE": 48, "CUMULATIVE": 49, "DYNAMIC_QUANTIZE": 50,
}  # fmt: skip
if at_least(10, 14):
    _LAYERS |= {"ATTENTION_INPUT": 51, "ATTENTION_OUTPUT": 52}

BuilderFlag = _enumeration("BuilderFlag", **(_FLAGS_11 if at_least(11) else _FLAGS_10))
LayerType = _enumeration("LayerType", **_LAYERS)
NetworkDefinitionCreationFlag = _enumeration(
    "NetworkDefinitionCreationFlag",
    **({} if at_least(11) else {"EXPLICIT_BATCH": 0}),
    STRONGLY_TYPED=0 if at_least(11) else 1,
)
OnnxParserFlag = _enumeration("OnnxParserFlag", NATIVE_INSTANCENORM=0, ENABLE_UINT8_AND_ASYMMETRIC_QUANTIZATION_DLA=1)
MemoryPoolType = _enumeration(
    "MemoryPoolType",
    WORKSPACE=0,
    DLA_MANAGED_SRAM=1,
    DLA_LOCAL_DRAM=2,
    DLA_GLOBAL_DRAM=3,
    TACTIC_DRAM=4,
    TACTIC_SHARED_MEMORY=5,
)
ProfilingVerbosity = _enumeration("ProfilingVerbosity", LAYER_NAMES_ONLY=0, NONE=1, DETAILED=2)
HardwareCompatibilityLevel = _enumeration(
    "HardwareCompatibilityLevel", NONE=0, AMPERE_PLUS=1, SAME_COMPUTE_CAPABILITY=2
)
TilingOptimizationLevel = _enumeration("TilingOptimizationLevel", NONE=0, FAST=1, MODERATE=2, FULL=3)
PreviewFeature = _enumeration(
    "PreviewFeature",
    **({} if at_least(11) else {"PROFILE_SHARING_0806": 0}),
    ALIASED_PLUGIN_IO_10_03=0 if at_least(11) else 1,
    RUNTIME_ACTIVATION_RESIZE_10_10=1 if at_least(11) else 2,
)
RuntimePlatform = _enumeration("RuntimePlatform", SAME_AS_BUILD=0, WINDOWS_AMD64=1)
EngineCapability = _enumeration("EngineCapability", STANDARD=0, SAFETY=1, DLA_STANDALONE=2)
TensorIOMode = _enumeration("TensorIOMode", NONE=0, INPUT=1, OUTPUT=2)
TensorLocation = _enumeration("TensorLocation", DEVICE=0, HOST=1)
TensorFormat = _enumeration("TensorFormat", LINEAR=0)
ExecutionContextAllocationStrategy = _enumeration(
    "ExecutionContextAllocationStrategy", STATIC=0, ON_PROFILE_CHANGE=1, USER_MANAGED=2
)
LayerInformationFormat = _enumeration("LayerInformationFormat", ONELINE=0, JSON=1)
EngineStat = _enumeration("EngineStat", TOTAL_WEIGHTS_SIZE=0, STRIPPED_WEIGHTS_SIZE=1)
SerializationFlag = _enumeration(
    "SerializationFlag",
    EXCLUDE_WEIGHTS=0,
    EXCLUDE_LEAN_RUNTIME=1,
    **({"INCLUDE_REFIT": 2} if at_least(10, 14) else {}),
)
ErrorCodeTRT = _enumeration(
    "ErrorCodeTRT",
    SUCCESS=0,
    UNSPECIFIED_ERROR=1,
    INTERNAL_ERROR=2,
    INVALID_ARGUMENT=3,
    INVALID_CONFIG=4,
    FAILED_ALLOCATION=5,
    FAILED_INITIALIZATION=6,
    FAILED_EXECUTION=7,
    FAILED_COMPUTATION=8,
    INVALID_STATE=9,
    UNSUPPORTED_STATE=10,
)
ErrorCode = _enumeration(
    "ErrorCode",
    SUCCESS=0,
    INTERNAL_ERROR=1,
    MEM_ALLOC_FAILED=2,
    MODEL_DESERIALIZE_FAILED=3,
    INVALID_VALUE=4,
    INVALID_GRAPH=5,
    INVALID_NODE=6,
    UNSUPPORTED_GRAPH=7,
    UNSUPPORTED_NODE=8,
    UNSUPPORTED_NODE_ATTR=9,
    UNSUPPORTED_NODE_INPUT=10,
    UNSUPPORTED_NODE_DATATYPE=11,
    UNSUPPORTED_NODE_DYNAMIC=12,
    UNSUPPORTED_NODE_SHAPE=13,
    REFIT_FAILED=14,
)
