"""ONNX Runtime's CUDA provider on a real GPU: a tiny network, built, opened, captured and launched."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.build_graph import SPEC, X, Y, write_network
from toolchain.cuda import driver as cuda
from toolchain.engines.onnxruntime_cuda.build import OnnxRuntimeCudaBuilder
from toolchain.engines.onnxruntime_cuda.run import OnnxRuntimeCudaRunner
from toolchain.recipe.options import OnnxRuntimeCudaOptions

BUILDER, RUNNER = OnnxRuntimeCudaBuilder(), OnnxRuntimeCudaRunner()
OPTIONS = OnnxRuntimeCudaOptions(tf32=False)


@pytest.fixture(scope="module", params=["float32", "float16"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    reason = RUNNER.available()
    if reason:
        pytest.skip(f"needs ONNX Runtime on a GPU: {reason}")
    place: Path = tmp_path_factory.mktemp(request.param)
    write_network(place, request.param)
    (place / "engine").mkdir()
    BUILDER.build(place / "graph.onnx", {"weights": place / "weights.safetensors"}, place / "engine", OPTIONS)
    return place


@pytest.fixture
def memory(folder: Path) -> Iterator[Any]:
    made = RUNNER.memory([], OPTIONS)
    yield made
    made.close()


def opened(folder: Path, memory: Any, **options: bool) -> Any:
    weights = {"weights": folder / "weights.safetensors"}
    return RUNNER.open(folder / "engine", weights, SPEC, replace(OPTIONS, **options), memory)


@pytest.mark.parametrize("options", [{}, {"cuda_graph": False}, {"prefer_nhwc": True}, {"tf32": True}])
def test_two_bindings_have_graphs_of_their_own(
    folder: Path, memory: Any, options: dict[str, bool], caplog: pytest.LogCaptureFixture
) -> None:
    engine = opened(folder, memory, **options)
    x = memory.zeros((2, 4), np.float32)
    ys = [memory.zeros((2, 4), np.float32) for _ in range(2)]
    launches = [engine.bind({"x": x, "y": y}) for y in ys]
    memory.write(x, X)
    launches[0]()
    memory.write(x, 2 * X)
    launches[1]()
    first, second = memory.read(*ys)
    np.testing.assert_allclose(first, Y, rtol=1e-2)
    np.testing.assert_allclose(second, 2 * Y, rtol=1e-2)
    assert caplog.messages == []  # of engines without a CUDA graph
    engine.close()


def test_a_thousand_launches_allocate_nothing(folder: Path, memory: Any) -> None:
    engine = opened(folder, memory)
    x, y = (memory.zeros((2, 4), np.float32) for _ in range(2))
    launch = engine.bind({"x": x, "y": y})
    memory.write(x, X)
    launch()
    memory.synchronize()
    free = cuda.free_memory_bytes()
    for _ in range(1000):
        launch()
    np.testing.assert_allclose(memory.read(y)[0], Y, rtol=1e-2)
    assert cuda.free_memory_bytes() >= free
    engine.close()
