"""The real TensorRT on a real GPU: a tiny step, built, opened, captured and launched."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from tests.profile_contract import check_two_buckets
from tests.step_engine import WEIGHT, bound, expected, opened, run, write_engine
from toolchain.cuda import driver as cuda
from toolchain.engines.tensorrt.engine import TensorRtMemory
from toolchain.engines.tensorrt.library import TENSORRT


@pytest.fixture(scope="module")
def trt() -> Any:
    reason = cuda.available()
    if reason:
        pytest.skip(f"needs a GPU: {reason}")
    if importlib.util.find_spec("tensorrt") is None:
        pytest.skip("needs TensorRT: pip install 'diffbuild[tensorrt]'")
    import tensorrt

    return tensorrt


@pytest.fixture(scope="module", params=["whole", "stripped"])
def folder(request: pytest.FixtureRequest, trt: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp(request.param)
    save_file({"weight": WEIGHT}, place / "weights.safetensors")
    return write_engine(trt, place / "engine", strip=request.param == "stripped")


@pytest.fixture(params=["step", "off"])
def memory(request: pytest.FixtureRequest, trt: Any) -> Iterator[TensorRtMemory]:
    made = TensorRtMemory(TENSORRT, request.param)
    yield made
    made.close()


@pytest.mark.parametrize("steps", [1, 4, 7])
def test_two_bindings_swap_their_states(folder: Path, memory: TensorRtMemory, steps: int) -> None:
    engine = opened(folder, memory, weights=folder.parent / "weights.safetensors")
    state, counter = run(engine, memory, steps)
    np.testing.assert_allclose(state, expected(steps), rtol=1e-3)
    assert counter == steps
    assert memory.counters.captures == (2 if memory.cuda_graph == "step" else 0)
    engine.close()


def test_a_thousand_launches_allocate_nothing(folder: Path, memory: TensorRtMemory) -> None:
    engine = opened(folder, memory, weights=folder.parent / "weights.safetensors")
    _, counters, launches = bound(engine, memory)
    launches[0]()
    launches[1]()
    memory.synchronize()
    free = cuda.free_memory_bytes()
    for index in range(998):
        launches[index % 2]()
    assert memory.read(counters[0])[0][0] == 1000
    assert cuda.free_memory_bytes() >= free
    engine.close()


def test_a_whole_run_is_one_launch(folder: Path, trt: Any, caplog: pytest.LogCaptureFixture) -> None:
    memory = TensorRtMemory(TENSORRT, "loop")
    engine = opened(folder, memory, weights=folder.parent / "weights.safetensors")
    states, counters, launches = bound(engine, memory)
    steps = memory.loop(*launches)
    steps(6)
    state, counter = memory.read(states[0], counters[0])
    np.testing.assert_allclose(state, expected(6), rtol=1e-3)
    assert counter[0] == 6
    assert memory.counters.launches == 1
    assert steps._while is not None, caplog.messages  # unrolled steps would be one launch as well
    engine.close()
    memory.close()


@pytest.mark.parametrize("strip_plan", [False, True])
@pytest.mark.parametrize("cuda_graph", ["step", "off"])
def test_two_buckets_share_an_engine(trt: Any, tmp_path: Path, cuda_graph: str, strip_plan: bool) -> None:
    check_two_buckets(tmp_path, cuda_graph=cuda_graph, strip_plan=strip_plan)
