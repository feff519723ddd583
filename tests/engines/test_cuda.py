"""A GPU's memory, on a pretended GPU whose streams run late: what may be asked for when, and what failures leave."""

from __future__ import annotations

import gc
import logging
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.device_contract import DeviceContract, Make, ShiftRegister, others_may_allocate, swap
from tests.pretend import pretended
from toolchain.cuda import driver as cuda
from toolchain.cuda.capturing import CapturingMemory
from toolchain.cuda.loop import UNROLLED
from toolchain.errors import EngineError


@pytest.fixture(scope="module")
def fake() -> Iterator[Any]:
    with pretended():
        from cuda.bindings import runtime

        yield runtime


@pytest.fixture
def gpu(fake: Any) -> Iterator[Any]:
    """The fake `cuda.bindings.runtime`. Nothing may be left of it, nor any rule have been broken."""
    yield fake
    assert fake._live() == []
    assert fake._VIOLATIONS == []


@pytest.fixture
def make(gpu: Any) -> Iterator[Make]:
    made = []

    def make_memory(cuda_graph: str = "step") -> CapturingMemory:
        made.append(CapturingMemory(cuda_graph))
        return made[-1]

    yield make_memory
    for memory in made:
        memory.close()


class TestPretendedGpu(DeviceContract):
    pass


def test_nothing_but_a_read_waits(gpu: Any, make: Make) -> None:
    memory = make()
    ends, enqueues = swap(memory)
    launches = [memory.capture(enqueue) for enqueue in enqueues]
    before = memory.counters.synchronisations
    for _ in range(10):
        memory.write(ends[0], 1)
        launches[0]()
        launches[1]()
    first, second = memory.mark(), memory.mark()
    assert memory.counters.synchronisations == before
    assert len(gpu._pending(memory.stream)) == 32
    memory.read(*ends)
    assert memory.counters.synchronisations == before + 1
    memory.elapsed_ms(first, second)


@pytest.mark.parametrize("failure", ["capture", "instantiate"])
def test_what_cannot_be_captured_is_launched_without(
    failure: str, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", failure)
    memory = make()
    ends, enqueues = swap(memory)
    with caplog.at_level(logging.WARNING, "toolchain"):
        launches = [memory.capture(enqueue) for enqueue in enqueues]
    assert launches == enqueues
    assert memory.counters.captures == 0
    assert len(caplog.messages) == 1
    assert "launched without" in caplog.messages[0]
    assert "cuda" in caplog.messages[0]
    memory.write(ends[0], 5)
    launches[0]()
    assert memory.read(ends[1])[0].max() == 5


def test_an_error_during_a_capture_ends_the_capture(make: Make) -> None:
    memory = make()
    buffer = memory.zeros((2,), np.float32)
    calls = []

    def enqueue() -> None:
        calls.append(0)
        if len(calls) == 2:
            raise KeyError("in the engine")

    with pytest.raises(KeyError):
        memory.capture(enqueue)
    memory.write(buffer, 4)
    assert memory.read(buffer)[0].tolist() == [4, 4]


def test_the_first_run_is_not_captured_and_may_fail(make: Make) -> None:
    def enqueue() -> None:
        raise EngineError("no")

    with pytest.raises(EngineError, match="no"):
        make().capture(enqueue)


def test_a_write_cannot_be_captured(make: Make) -> None:
    memory = make()
    buffer = memory.zeros((2,), np.float32)
    with pytest.raises(AssertionError, match="given out again"):
        memory.capture(lambda: memory.write(buffer, 1))


def test_work_that_waits_spoils_its_capture_alone(gpu: Any, make: Make) -> None:
    memory = make()
    assert memory.capture(memory.synchronize) == memory.synchronize
    assert gpu._VIOLATIONS == ["cudaStreamSynchronize during a capture"]
    gpu._VIOLATIONS.clear()
    _, enqueues = swap(memory)
    memory.capture(enqueues[0])()
    assert memory.counters.captures == 1


def test_a_failed_call_is_named(make: Make) -> None:
    memory = make()
    with pytest.raises(EngineError) as caught:
        cuda.call("cudaMemcpyAsync", 0, 0, 1, 3, 99)
    assert caught.value.where == "cudaMemcpyAsync"
    assert str(caught.value.got) == "cudaErrorInvalidResourceHandle: the fake's text for 400"
    memory.close()


@pytest.mark.parametrize(
    ("failure", "reason"),
    [
        ("no_driver", "no NVIDIA driver"),
        ("old_driver", "the NVIDIA driver knows CUDA 12.2, CUDA 13.0 or newer is needed"),
        ("no_device", "no NVIDIA GPU can be used: cudaErrorNoDevice: the fake's text for 100"),
    ],
)
def test_the_reason_for_no_gpu(gpu: Any, monkeypatch: pytest.MonkeyPatch, failure: str, reason: str) -> None:
    assert cuda.available() is None
    monkeypatch.setenv("FAKE_CUDA_FAIL", failure)
    assert cuda.available() == reason
    with pytest.raises(EngineError, match="no GPU can be used"):
        cuda.device_facts()
    with pytest.raises(EngineError):
        CapturingMemory()


def test_without_cuda_python(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in sys.modules if n.split(".")[0] == "cuda"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cuda", None)
    assert str(cuda.available()).startswith("cuda-python cannot be imported")


def test_facts_of_the_gpu(gpu: Any, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_GPU", "NVIDIA L40S")
    monkeypatch.setenv("FAKE_CUDA_CC", "8.9")
    monkeypatch.setenv("FAKE_CUDA_SMS", "142")
    monkeypatch.setenv("FAKE_CUDA_MEMORY_MB", "46068")
    assert cuda.device_facts() == {
        "name": "NVIDIA L40S",
        "compute_capability": "8.9",
        "sm_count": 142,
        "memory_bytes": 46068 << 20,
        "driver": "13.0",
        "cuda": "13.0",
    }
    make().zeros((1 << 20,), np.uint8)
    assert cuda.free_memory_bytes() == 46067 << 20


@pytest.mark.parametrize("failure", ["conditional", "no_nvrtc"])
def test_a_loop_without_conditions_is_unrolled(
    failure: str, gpu: Any, make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", failure)
    memory = make("loop")
    register = ShiftRegister(memory)
    run = memory.loop(*register.launches)
    assert [m.split(":")[0] for m in caplog.messages] == ["each number of steps is captured on its own"]
    for steps in (5, 4, 5):
        assert register.place_after(run, steps) == steps
    assert (memory.counters.captures, memory.counters.launches) == (3, 5)  # twice an odd step of its own
    for steps in range(2, 41, 2):
        assert register.place_after(run, steps) == steps
    assert len([line for line in gpu._live() if line.startswith("executable")]) == 2 + UNROLLED


def test_a_loop_that_cannot_be_captured_launches_its_steps(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    memory = make("loop")
    register = ShiftRegister(memory)
    monkeypatch.setenv("FAKE_CUDA_FAIL", "capture")
    run = memory.loop(*register.launches)
    before = memory.counters.launches
    for steps in (5, 4, 4):
        assert register.place_after(run, steps) == steps
    assert memory.counters.launches - before == 13
    told = [line.split(":")[0] for line in caplog.messages]
    assert told == ["each number of steps is captured on its own", "steps are launched one by one"]


def test_closing_goes_on_after_an_error_that_cuda_repeats(
    gpu: Any, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory = make("loop")
    register = ShiftRegister(memory)
    assert memory.loop(*register.launches) is not None
    buffers = [memory.zeros((4,), np.float32) for _ in range(2)]

    def repeated(name: str, module: Any, failed: Any) -> None:
        plain = getattr(module, name)

        def call(*args: Any) -> Any:
            plain(*args)
            return (failed,)

        monkeypatch.setattr(module, name, call)

    from cuda.bindings import driver

    for name in ("cudaStreamSynchronize", "cudaGraphExecDestroy", "cudaFree"):
        repeated(name, gpu, gpu.cudaError_t.cudaErrorInvalidResourceHandle)
    repeated("cuModuleUnload", driver, driver.CUresult.CUDA_ERROR_NOT_FOUND)
    memory.free(*buffers)
    memory.release(*register.launches)
    memory.close()
    assert gpu._live() == []


def test_no_garbage_is_collected_during_a_capture(make: Make) -> None:
    memory, seen = make("step"), []
    memory.capture(lambda: seen.append(gc.isenabled()))
    assert seen == [True, False]
    assert gc.isenabled()


def test_the_first_run_allocates_alone(make: Make) -> None:
    """A capture in global mode by another thread does not stand an allocation; work that is captured makes none."""
    memory, seen = make("step"), []
    memory.capture(lambda: seen.append(others_may_allocate()))
    assert seen == [False, True]
    assert others_may_allocate()


def test_graphs_and_modules_are_made_and_destroyed_alone(gpu: Any, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """They take memory of the GPU, as buffers do."""
    from cuda.bindings import driver

    memory, seen = make("loop"), dict[str, bool]()

    def watch(module: Any, name: str) -> None:
        plain = getattr(module, name)

        def call(*args: Any) -> Any:
            seen[name] = others_may_allocate()
            return plain(*args)

        monkeypatch.setattr(module, name, call)

    on_gpu = ("cudaMalloc", "cudaFree", "cudaHostAlloc", "cudaFreeHost", "cudaGraphInstantiate", "cudaGraphUpload")
    for name in (*on_gpu, "cudaGraphExecDestroy"):
        watch(gpu, name)
    for name in ("cuModuleLoadData", "cuModuleUnload"):
        watch(driver, name)
    register = ShiftRegister(memory)
    loop = memory.loop(*register.launches)
    assert loop is not None
    loop(2)
    memory.release(register.launches[0])
    seen_then = dict(seen)
    memory.close()
    assert len(seen) == 9
    assert not any([*seen_then.values(), *seen.values()]), (seen_then, seen)


def test_what_was_not_captured_has_no_loop(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FAKE_CUDA_FAIL", "capture")
    memory = make("loop")
    register = ShiftRegister(memory)
    assert memory.loop(*register.launches) is None
    assert memory._loops == {}


def test_the_loops_kernel_compiles(tmp_path: Path) -> None:
    """With the real NVRTC, which needs no GPU."""
    package = "nvidia-cuda-nvrtc"
    command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(tmp_path), package, "cuda-bindings>=13"]
    done = subprocess.run(command, capture_output=True, text=True)
    library = next(tmp_path.glob("nvidia/*/lib/libnvrtc.so*"), None)
    if done.returncode or library is None:
        pytest.skip(f"{package} cannot be installed: {done.stderr.strip().splitlines()[-1:]}")
    code = "from toolchain.cuda.loop import *; print(*(KERNEL in compile_kernel(c) for c in ('8.0', '9.0')))"
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "LD_LIBRARY_PATH": str(library.parent)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.split() == ["True", "True"], done.stderr


def test_the_fake_sees_stale_pointers(gpu: Any) -> None:
    """The fake is the judge of the other tests: what it must not let pass."""
    kinds = gpu.cudaMemcpyKind
    _, stream = gpu.cudaStreamCreateWithFlags(gpu.cudaStreamNonBlocking)
    (_, device), (_, pinned) = gpu.cudaMalloc(64), gpu.cudaHostAlloc(64, 0)
    host = np.zeros(64, np.uint8)
    with pytest.raises(AssertionError, match="no live block"):
        gpu.cudaMemcpyAsync(host.ctypes.data, device, 64, kinds.cudaMemcpyDeviceToHost, stream)
    with pytest.raises(AssertionError, match="no live block"):
        gpu.cudaMemsetAsync(device, 0, 65, stream)
    gpu.cudaMemcpyAsync(pinned, device, 64, kinds.cudaMemcpyDeviceToHost, stream)
    gpu.cudaFree(device)
    with pytest.raises(AssertionError, match="no live block"):
        gpu.cudaStreamSynchronize(stream)
    with pytest.raises(AssertionError, match="no live device block"):
        gpu.cudaFree(device)
    assert gpu._live() == ["pinned block of 64 bytes", f"stream {int(stream)}"]
    gpu.cudaFreeHost(pinned)
    gpu.cudaStreamDestroy(stream)
    assert len(gpu._VIOLATIONS) == 4
    gpu._VIOLATIONS.clear()
