"""A tiny denoising step as a TensorRT engine, for tests of the pretended and of the real TensorRT."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from toolchain.engines.tensorrt.engine import TensorRtEngine, TensorRtMemory
from toolchain.signature import GraphSpec, TensorSpec

WEIGHT = np.float32([[0, 1, 0, 0], [0, 0, 2, 0], [0, 0, 0, 1], [0.5, 0, 0, 0]])
STATE = np.arange(8, dtype=np.float32).reshape(2, 4)
SPEC = GraphSpec(
    (TensorSpec("state", "float32", (2, 4)), TensorSpec("step", "int64", (1,))),
    (
        TensorSpec("next_state", "float32", (2, 4)),
        TensorSpec("next_step", "int64", (1,)),
        TensorSpec("preview", "float16", (2, 4)),
    ),
)
TYPES = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "int64": TensorProto.INT64}


def model(*, weightless: bool = False) -> bytes:
    """next_state = state @ weight; next_step = step + 1; preview = float16(next_state)"""
    weight = numpy_helper.from_array(WEIGHT, "weight")
    if weightless:
        weight.ClearField("raw_data")
        weight.data_location = TensorProto.EXTERNAL
        for key, value in (("location", "weights"), ("offset", "0"), ("length", str(WEIGHT.nbytes))):
            weight.external_data.add(key=key, value=value)
    nodes = [
        helper.make_node("MatMul", ["state", "weight"], ["next_state"], name="network"),
        helper.make_node("Add", ["step", "one"], ["next_step"], name="count"),
        helper.make_node("Cast", ["next_state"], ["preview"], to=TensorProto.FLOAT16, name="cast"),
    ]
    ends = [
        [helper.make_tensor_value_info(t.name, TYPES[t.dtype], t.shape) for t in side]
        for side in (SPEC.inputs, SPEC.outputs)
    ]
    one = numpy_helper.from_array(np.int64([1]), "one")
    graph = helper.make_graph(nodes, "step", *ends, [weight, one])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    return bytes(made.SerializeToString())


def write_engine(trt: Any, folder: Path, *, strip: bool = False, **facts: Any) -> Path:
    """An engine's folder as the builder writes it."""
    builder = trt.Builder(trt.Logger())
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, builder.logger).parse(model())
    config = builder.create_builder_config()
    if strip:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    plan = bytes(builder.build_serialized_network(network, config))
    folder.mkdir()
    (folder / "engine.plan").write_bytes(plan)
    if strip:
        (folder / "graph.onnx").write_bytes(model(weightless=True))
    said = {
        "format": 1,
        "options": {},
        "plan_bytes": len(plan),
        "stripped": strip,
        "refit": {"graph": "graph.onnx", "weights": ["weight"]} if strip else None,
        "activation_bytes": 4096,
    }
    (folder / "engine.json").write_text(json.dumps(said | facts))
    return folder


def opened(folder: Path, memory: TensorRtMemory, spec: GraphSpec = SPEC, weights: Path | None = None) -> TensorRtEngine:
    return TensorRtEngine(folder, {} if weights is None else {"weights": weights}, spec, memory)


def bound(engine: TensorRtEngine, memory: TensorRtMemory) -> tuple[Any, Any, Any]:
    """Two states, two counters and the two launches that swap them, as the runtime binds a step."""
    states, counters = ([memory.zeros(t.shape, t.dtype) for _ in range(2)] for t in SPEC.inputs)
    launches = [
        engine.bind({"state": states[a], "step": counters[a], "next_state": states[b], "next_step": counters[b]})
        for a, b in ((0, 1), (1, 0))
    ]
    memory.write(states[0], STATE)
    memory.write(counters[0], 0)
    return states, counters, launches


def run(engine: TensorRtEngine, memory: TensorRtMemory, steps: int) -> tuple[Any, int]:
    states, counters, launches = bound(engine, memory)
    for index in range(steps):
        launches[index % 2]()
    state, counter = memory.read(states[steps % 2], counters[steps % 2])
    return state, int(counter[0])


def expected(steps: int) -> Any:
    return STATE @ np.linalg.matrix_power(WEIGHT, steps)
