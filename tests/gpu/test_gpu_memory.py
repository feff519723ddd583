"""`DeviceMemory` on a real GPU: the same promises as on the pretended one. Needs cuda-python and a driver."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from tests.device_contract import DeviceContract, Make, ShiftRegister, swap
from toolchain.cuda import driver as cuda
from toolchain.cuda.capturing import CapturingMemory


@pytest.fixture(scope="module", autouse=True)
def _a_gpu() -> None:
    reason = cuda.available()
    if reason:
        pytest.skip(f"needs a GPU: {reason}")


@pytest.fixture
def make() -> Iterator[Make]:
    made = []

    def make_memory(cuda_graph: str = "step") -> CapturingMemory:
        made.append(CapturingMemory(cuda_graph))
        return made[-1]

    yield make_memory
    for memory in made:
        memory.close()


class TestRealGpu(DeviceContract):
    pass


def test_the_driver_takes_the_loop(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    """Unrolled steps, the way out where it refuses, would pass everything else."""
    memory = make("loop")
    steps = memory.loop(*ShiftRegister(memory).launches)
    assert steps is not None
    assert steps._while is not None, caplog.messages


def test_facts_of_the_gpu() -> None:
    facts = cuda.device_facts()
    assert all(re.fullmatch(r"\d+\.\d+", facts[name]) for name in ("compute_capability", "driver", "cuda"))
    assert facts["name"].isprintable()
    assert facts["sm_count"] > 0
    assert 0 < cuda.free_memory_bytes() <= facts["memory_bytes"]


def test_memory_is_given_back(make: Make) -> None:
    memory = make()
    before = cuda.free_memory_bytes()
    memory.zeros((64 << 20,), "uint8")
    assert before - cuda.free_memory_bytes() >= 64 << 20
    memory.close()
    assert cuda.free_memory_bytes() >= before


def test_free_memory_is_constant_over_a_thousand_rounds(make: Make) -> None:
    memory = make()
    ends, enqueues = swap(memory)
    launches = [memory.capture(enqueue) for enqueue in enqueues]
    free = []
    for index in range(1000):
        memory.write(ends[0], index)
        for launch in launches:
            launch()
        assert memory.read(ends[1])[0].max() == index
        free.append(cuda.free_memory_bytes())
    assert free[-1] >= free[10]
