"""The compute capabilities that an engine of TensorRT for RTX is compiled for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from toolchain.engines.tensorrt.library import numbers
from toolchain.errors import EngineError

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT8 = "8.9"
"""The first compute capability with float8."""
WITH_FLOAT8 = (FLOAT8, "12.0", "12.1")


def chosen_targets(model: ir.Model, asked: tuple[str, ...]) -> tuple[str, ...]:
    """The targets `asked` for, or those that the graph's types leave. Empty: the library's own, all from 8.0 on.

    The library's own are preferred to a list of all: a plan is then the same byte for byte in every build.
    EngineError for a target that lacks a type of the graph.
    """
    if not _has_float8(model):
        return asked
    early = [target for target in asked if numbers(target) < numbers(FLOAT8)]
    if early:
        raise EngineError(
            "a target of the recipe has no float8",
            where=f"tensorrt_rtx.targets: {', '.join(early)}",
            expected=" or ".join(WITH_FLOAT8),
            hint="leave these targets out, or give the component another dtype",
        )
    return asked or WITH_FLOAT8


def _has_float8(model: ir.Model) -> bool:
    values = [*model.graph.initializers.values(), *(value for node in model.graph for value in node.outputs)]
    return any(value.dtype is not None and value.dtype.name == "FLOAT8E4M3FN" for value in values)


def set_targets(trt: Any, config: Any, targets: Sequence[str]) -> None:
    """Has a builder config compile for `targets`, such as "8.9"; nothing where there are none. EngineError."""
    if not targets:
        return
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(sorted(targets, key=numbers)):
        capability = getattr(trt.ComputeCapability, f"SM{target.replace('.', '')}", None)
        if capability is None or not config.set_compute_capability(capability, index):
            raise EngineError(f"this TensorRT for RTX cannot compile for {target}", got=trt.__version__)
