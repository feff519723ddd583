"""How an engine of TensorRT for RTX is opened: whether it runs on this GPU, and how its contexts run.

`trt` is the library's module.
"""

from __future__ import annotations

import mmap
from typing import Any

from toolchain.cuda.driver import device_facts

DIAGNOSTICS = (
    "VERSION_MISMATCH",
    "UNSUPPORTED_CC",
    "OLD_CUDA_DRIVER",
    "OLD_CUDA_RUNTIME",
    "INSUFFICIENT_GPU_MEMORY",
    "MALFORMED_ENGINE",
    "CUDA_ERROR",
)


def ask_validity(trt: Any, runtime: Any, plan: mmap.mmap) -> tuple[str, str]:
    """ "valid", "suboptimal" or "invalid"; and why, with the GPU and the version that the library was asked about."""
    here = device_facts()
    validity, bits = runtime.get_engine_validity(plan)
    kinds = trt.EngineInvalidityDiagnostics
    names = [name for name in DIAGNOSTICS if int(bits) & int(getattr(kinds, name))]
    why = ", ".join(names).lower().replace("_", " ") or "no reason given"
    gpu = f"{here['name']} (compute capability {here['compute_capability']})"
    return validity.name.lower(), f"{why}: {gpu}, TensorRT for RTX {trt.__version__}"


def runtime_config(trt: Any, engine: Any, kernel_specialization: str) -> Any:
    """How contexts run an engine: on memory that is given to them, and captured by us."""
    config = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(trt.ExecutionContextAllocationStrategy.USER_MANAGED)
    config.cuda_graph_strategy = trt.CudaGraphStrategy.DISABLED  # the step is captured as a whole, and not in parts
    strategy = getattr(trt.DynamicShapesKernelSpecializationStrategy, kernel_specialization.upper())
    config.dynamic_shapes_kernel_specialization_strategy = strategy
    return config
