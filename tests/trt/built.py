"""A small model, and its way through parser and builder, for the pretended TensorRT and for NVIDIA's own."""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from tests.rtx import recording_logger

WEIGHT = np.arange(32, dtype=np.float16).reshape(4, 8)


def model(weight: np.ndarray[Any, Any] = WEIGHT, *, external: bool = False, dims: Any = (2, 4)) -> bytes:
    """z = float32(x @ w)"""
    tensor = numpy_helper.from_array(weight, "w")
    if external:
        tensor.ClearField("raw_data")
        tensor.data_location = 1
        for key, value in (("location", "weights"), ("offset", "0"), ("length", str(weight.nbytes))):
            entry = tensor.external_data.add()
            entry.key, entry.value = key, value
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["y"], name="mm"),
        helper.make_node("Cast", ["y"], ["z"], to=1, name="c"),
    ]
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT16, dims)
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, [dims[0], weight.shape[1]])
    graph = helper.make_graph(nodes, "g", [x], [z], [tensor])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


class Built:
    """A parsed network and its config; `plan()` builds it."""

    def __init__(self, trt: Any, data: bytes) -> None:
        self.trt = trt
        self.log: list[tuple[str, str]] = []
        self.logger = recording_logger(trt, self.log)
        self.builder = trt.Builder(self.logger)
        strong = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
        self.network = self.builder.create_network(strong)
        self.parser = trt.OnnxParser(self.network, self.logger)
        self.data = data
        self.config = self.builder.create_builder_config()
        self.config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        self.runtime = trt.Runtime(self.logger)

    def plan(self, parse: bool = True) -> Any:
        if parse:
            assert self.parser.parse(self.data), self.log
        return self.builder.build_serialized_network(self.network, self.config)

    def engine(self) -> Any:
        plan = self.plan()
        assert plan is not None, self.log
        return self.runtime.deserialize_cuda_engine(plan)

    def said(self, text: str) -> bool:
        return any(text in message for _, message in self.log)


def monitor(trt: Any, answer: Any, steps: list[str]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            steps.append(f"{parent_phase} > {phase_name} {num_steps}")

        def step_complete(self, phase_name: str, step: int) -> Any:
            return answer()

        def phase_finish(self, phase_name: str) -> None:
            steps.append(phase_name)

    return Monitor()
