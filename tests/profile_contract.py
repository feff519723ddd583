"""What an engine for two buckets must do, on the pretended TensorRT and on the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.build_graph import WEIGHTS, options, write_two_buckets
from toolchain.engines.builders import builder_of
from toolchain.engines.runners import runner_of
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec, TensorSpec


def check_two_buckets(folder: Path, backend: str = "tensorrt", **given: Any) -> None:
    """Builds one, opens both buckets at once and in turns, and compares what they compute."""
    specs = write_two_buckets(folder)
    builder, runner = builder_of(backend), runner_of(backend)
    chosen = options(backend, profile_per_bucket=True, **given)
    weights = {"weights": folder / "weights.safetensors"}
    out = folder / "engine"
    out.mkdir()
    builder.build(folder / "graph.onnx", weights, out, chosen)
    memory: Any = runner.memory([out], chosen)
    engines = [runner.open(out, weights, spec, chosen, memory) for spec in specs]
    (plan,) = memory._plans.values()
    assert plan.profiles == len(specs)
    launches = []
    for engine, spec in zip(engines, specs, strict=True):
        x, y = (memory.zeros(t.shape, t.dtype) for t in (*spec.inputs, *spec.outputs))
        launches.append((engine.bind({"x": x, "y": y}), x, y))
    for scale in (1.0, 2.0):
        for launch, x, y in launches:
            given_x = np.arange(x.shape[0] * 4, dtype=np.float32).reshape(x.shape) * scale / 8
            memory.write(x, given_x)
            launch()
            expected = given_x @ WEIGHTS["a"] @ WEIGHTS["b"] @ WEIGHTS["c"].T
            np.testing.assert_allclose(memory.read(y)[0], expected, rtol=1e-2)
    wrong = GraphSpec(*((TensorSpec(name, "float32", (5, 4)),) for name in "xy"))
    with pytest.raises(EngineError, match="other inputs or outputs than its manifest"):
        runner.open(out, weights, wrong, chosen, memory)
    for engine in engines:
        engine.close()
    again = runner.open(out, weights, specs[1], chosen, memory)
    assert list(memory._plans.values()) == [plan]  # it stayed open: another bucket is likely to come
    memory.close()
    again.close()
    assert memory._plans == {}
