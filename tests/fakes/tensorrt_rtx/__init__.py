# ruff: noqa: F403
"""A stand-in for NVIDIA's `tensorrt_rtx` in tests: the fake `tensorrt`, and what TensorRT for RTX has otherwise.

It builds without a GPU for compute capabilities, tells of an engine's layers in its log alone, asks a plan's validity,
and finishes kernels when a context is made, with a cache for them. FAKE_TENSORRT_RTX_VERSION is the version that it
claims. FAKE_TENSORRT_RTX_FAIL, a comma list: "not_capturable", "suboptimal", "cache_refused".
"""

from __future__ import annotations

from tensorrt import *
from tensorrt import violations

from tensorrt_rtx._builder import Builder, BuilderFlag, ComputeCapability, IBuilderConfig
from tensorrt_rtx._engine import (
    CudaGraphStrategy,
    DynamicShapesKernelSpecializationStrategy,
    EngineInvalidityDiagnostics,
    EngineValidity,
    ICudaEngine,
    IExecutionContext,
    IRuntimeCache,
    IRuntimeConfig,
    Runtime,
)
from tensorrt_rtx._rules import VERSION

__version__ = VERSION
__all__ = [
    "Builder",
    "BuilderFlag",
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "IBuilderConfig",
    "ICudaEngine",
    "IExecutionContext",
    "IRuntimeCache",
    "IRuntimeConfig",
    "Runtime",
    "violations",
]
