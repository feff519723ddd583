"""NVIDIA's real ONNX parser and builder, which TensorRT for RTX brings to machines without a GPU.

Weights by reference are zeros here, and scales positive: a parser looks at types and shapes, and so does most of a
builder.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from toolchain.engines.tensorrt.library import TENSORRT_RTX
from toolchain.errors import EngineError
from toolchain.precision.stored import SCALES


def real_trt() -> Any:
    """The module. Skips the test, with the reason, where its wheels are not installed."""
    try:
        return TENSORRT_RTX.module()
    except EngineError as error:
        pytest.skip(f"{error.what}: {error.got}")


def recording_logger(trt: Any, log: list[tuple[str, str]]) -> Any:
    """A logger of either library, real or pretended, that puts (severity, message) into `log`."""

    class Log(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, msg: str) -> None:
            log.append((severity.name, msg))

    return Log()


class Parsed:
    """A graph in the hands of the real parser, which keeps bare addresses: what it needs lives as long as this.

    refused  what the parser says of the nodes that it does not take; empty when it takes the graph
    log      (severity, message) of everything that was logged, the builder's words included
    """

    def __init__(self, model: ir.Model) -> None:
        trt = real_trt()
        self.log: list[tuple[str, str]] = []
        self._trt, self._logger, self._model = trt, recording_logger(trt, self.log), model
        self.builder = trt.Builder(self._logger)
        self.network = self.builder.create_network(0)
        self.parser = trt.OnnxParser(self.network, self._logger)
        self.refused: list[str] = []
        proto = ir.to_proto(model)
        loaded = self.parser.load_model_proto(proto.SerializeToString())
        self._weights = [] if not loaded else self._hand_over(model)
        if not loaded or not self.parser.parse_model_proto():
            errors = [self.parser.get_error(i) for i in range(self.parser.num_errors)]
            self.refused = [f"{e.node_operator()} {e.node_name()}: {e.desc()}" for e in errors] or ["no reason given"]

    def _hand_over(self, model: ir.Model) -> list[Any]:
        kept = []
        for name, value in model.graph.initializers.items():
            tensor = value.const_value
            if isinstance(tensor, ir.ExternalTensor):
                # A scale must be positive: these bits are so in every float type.
                kept.append(np.full(max(tensor.nbytes, 1), 0x3C if str(name).endswith(SCALES) else 0, np.uint8))
                assert self.parser.load_initializer(name, kept[-1].ctypes.data, tensor.nbytes), name
        return kept

    def build(self, *targets: str, profiles: Callable[[Any, Any, ir.Model], None] | None = None) -> bytes | None:
        """The plan, or None: `log` says why. `targets` are names such as "SM89"; none stand for all of them. `profiles`
        adds to a config the shapes of a graph with dynamic ones."""
        assert not self.refused, self.refused
        config = self.builder.create_builder_config()
        if profiles is not None:
            profiles(self.builder, config, self._model)
        if targets:
            config.num_compute_capabilities = len(targets)
            for index, target in enumerate(targets):
                assert config.set_compute_capability(getattr(self._trt.ComputeCapability, target), index)
        plan = self.builder.build_serialized_network(self.network, config)
        return None if plan is None else bytes(memoryview(plan))

    def errors(self) -> list[str]:
        return [message for severity, message in self.log if severity in ("INTERNAL_ERROR", "ERROR")]
