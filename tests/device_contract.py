"""What `DeviceMemory` and `CapturingMemory` promise, as tests that run on the pretended GPU and on a real one.

A class that derives from `DeviceContract` needs a fixture `make`: cuda_graph -> a CapturingMemory, closed at the end.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from toolchain.cuda import staging
from toolchain.cuda.capturing import CUDA_GRAPHS
from toolchain.cuda.driver import ALLOCATION
from toolchain.cuda.loop import by_turns
from toolchain.errors import EngineError

Make = Callable[..., Any]
F32 = np.float32


def swap(memory: Any) -> tuple[list[Any], list[Callable[[], None]]]:
    """Two buffers and what enqueues a copy from one to the other, in both directions."""
    ends = [memory.zeros((3, 5), F32) for _ in range(2)]
    return ends, [lambda: memory.copy(ends[1], ends[0]), lambda: memory.copy(ends[0], ends[1])]


def others_may_allocate() -> bool:
    """Whether a thread beside this one gets the lock of those who allocate at once."""
    got: list[bool] = []

    def ask() -> None:
        got.append(ALLOCATION.acquire(blocking=False))
        if got[0]:
            ALLOCATION.release()

    thread = threading.Thread(target=ask)
    thread.start()
    thread.join()
    return got[0]


STEPS = 64


class ShiftRegister:
    """Two states; a step copies one into the other, a place further on. After n steps the one is at place n."""

    def __init__(self, memory: Any) -> None:
        self.memory = memory
        self.states = [memory.zeros((STEPS,), F32) for _ in range(2)]
        ends = [(self.states[0], self.states[1]), (self.states[1], self.states[0])]
        zero = memory.zeros((1,), F32)

        def enqueue(source: Any, target: Any) -> None:
            memory.copy(target[1:], source[:-1])
            memory.copy(target[:1], zero)

        self.launches = [memory.capture(partial(enqueue, *pair)) for pair in ends]

    def place_after(self, run: Callable[[int], None], steps: int) -> int:
        for state in self.states:
            self.memory.write(state, 0)
        self.memory.write(self.states[0][0], 1)
        run(steps)
        state = self.memory.read(self.states[steps % 2])[0]
        assert state.sum() == 1
        return int(state.argmax())


class DeviceContract:
    @pytest.mark.parametrize("dtype", ["float32", "float16", "int64", "uint8", "bool"])
    def test_buffers_start_as_zeros_and_hold_what_is_written(self, make: Make, dtype: str) -> None:
        memory = make()
        first, second = memory.zeros((2, 3), dtype), memory.zeros((), dtype)
        assert all(b.address % 256 == 0 for b in (first, second))
        for found, shape in zip(memory.read(first, second), ((2, 3), ()), strict=True):
            assert found.shape == shape
            assert found.dtype == dtype
            assert not found.any()
        value = np.arange(6).reshape(2, 3).astype(dtype)
        memory.write(first, value)
        memory.write(second, 1)
        found, scalar = memory.read(first, second)
        assert (found == value).all()
        assert scalar == 1

    def test_values_are_broadcast_and_cast(self, make: Make) -> None:
        memory = make()
        buffer = memory.zeros((2, 3), F32)
        memory.write(buffer, [1, 2, 3])
        assert memory.read(buffer)[0].tolist() == [[1, 2, 3], [1, 2, 3]]
        with pytest.raises(ValueError, match="broadcast"):
            memory.write(buffer, np.zeros(4))

    def test_rows_are_views(self, make: Make) -> None:
        memory = make()
        buffer = memory.zeros((4, 2), np.int32)
        memory.write(buffer, np.arange(8).reshape(4, 2))
        memory.write(buffer[-1], 9)
        memory.copy(buffer[:1], buffer[2:3])
        memory.write(buffer[1][1], 7)
        assert memory.read(buffer)[0].tolist() == [[4, 5], [2, 7], [4, 5], [9, 9]]
        assert buffer[1:].shape == (3, 2)
        assert buffer[3:1].shape == (0, 2)
        assert buffer[0].dtype == np.int32
        assert memory.read(buffer[4:])[0].shape == (0, 2)
        with pytest.raises(IndexError, match="row 4 of 4"):
            buffer[4]

    def test_values_may_change_after_a_write(self, make: Make) -> None:
        """More than one chunk of pinned memory waits: no piece of it is given out twice."""
        memory = make()
        value = np.zeros((256, 1024), F32)
        buffers = [memory.zeros(value.shape, F32) for _ in range(8)]
        for index, buffer in enumerate(buffers):
            value[:] = index
            memory.write(buffer, value)
        value[:] = -1
        assert [float(found.max()) for found in memory.read(*buffers)] == list(range(8))
        assert memory.counters.synchronisations == 1

    def test_what_was_read_stays(self, make: Make) -> None:
        memory = make()
        buffer = memory.zeros((5,), F32)
        first = memory.read(buffer)[0]
        memory.write(buffer, 3)
        assert memory.read(buffer)[0].tolist() == [3] * 5
        assert not first.any()

    def test_pinned_memory_has_a_limit(self, make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(staging, "STAGED_BYTES", 4096)
        memory = make()
        rows = memory.zeros((64, 128), F32)
        for index in range(64):
            memory.write(rows[index], index)
        assert memory.counters.synchronisations == 7  # 8 rows of 512 bytes fit
        assert (memory.read(rows)[0] == np.arange(64)[:, None]).all()
        assert memory.counters.pinned_bytes == staging.CHUNK_BYTES

    @pytest.mark.parametrize("mode", CUDA_GRAPHS)
    def test_launches_do_what_was_captured(self, make: Make, mode: str) -> None:
        memory = make(mode)
        ends, enqueues = swap(memory)
        launches = [memory.capture(enqueue) for enqueue in enqueues]
        for value in (1, 2):  # a graph reads what is there when it runs
            memory.write(ends[0], value)
            launches[0]()
            memory.write(ends[0], 0)
            launches[1]()
            assert [found.max() for found in memory.read(*ends)] == [value, value]
        counters = memory.counters
        assert (counters.captures, counters.launches) == ((0, 0) if mode == "off" else (2, 4))

    def test_a_thousand_pictures_cost_no_memory(self, make: Make) -> None:
        memory = make()
        ends, enqueues = swap(memory)
        launches = [memory.capture(enqueue) for enqueue in enqueues]
        noise = np.zeros((3, 5), F32)
        settled: dict[str, int] = {}
        for index in range(1000):
            started = memory.mark()
            noise[:] = index
            memory.write(ends[0], noise)
            launches[0]()
            noise[:] = -1
            memory.write(ends[0], noise)
            launches[1]()
            ended = memory.mark()
            assert memory.read(ends[0])[0].max() == index
            assert memory.elapsed_ms(started, ended) >= 0
            if index == 0:
                settled = vars(memory.counters).copy()
        grown = {"launches": 2002 - 2, "synchronisations": settled["synchronisations"] + 999}
        assert vars(memory.counters) == settled | grown
        assert len(memory._events) == 3  # the marks of one picture live until the next has its own

    def test_time_passes_between_marks(self, make: Make) -> None:
        memory = make()
        buffers = [memory.zeros((1 << 20,), F32) for _ in range(2)]
        first = memory.mark()
        for _ in range(20):
            memory.copy(*buffers)
        second = memory.mark()
        memory.read()
        assert 0 < memory.elapsed_ms(first, second) < 60_000
        del first, second
        gc.collect()
        assert len(memory._free_events) == 2

    def test_engines_share_one_scratch_block(self, make: Make) -> None:
        memory = make()
        memory.reserve(5000)
        first = memory.scratch(1000)
        assert first.nbytes == 5000
        assert first.address % 256 == 0
        assert memory.scratch(5000) is first
        assert memory.scratch(0) is first
        larger = memory.scratch(6000)
        assert larger.nbytes == 6000
        assert larger.address != first.address
        assert memory.scratch(10) is larger
        memory.copy(first[:8], larger[:8])  # the smaller one is still there, for the graphs that hold its address
        memory.synchronize()

    def test_too_large_a_buffer_says_what_is_free(self, make: Make) -> None:
        memory = make()
        with pytest.raises(EngineError) as caught:
            memory.zeros((1 << 40, 1 << 8), np.uint8)
        assert str(caught.value).splitlines()[0] == "the GPU's memory is too small"
        assert caught.value.expected == "268435456 MiB free"
        assert "MiB free of" in str(caught.value.got)
        assert memory.read(memory.zeros((2,), F32))[0].tolist() == [0, 0]

    @pytest.mark.parametrize("mode", ["step", "off"])
    def test_steps_that_are_launched_one_by_one_have_no_loop(self, make: Make, mode: str) -> None:
        memory = make(mode)
        register = ShiftRegister(memory)
        assert memory.loop(*register.launches) is None
        assert register.place_after(partial(by_turns, *register.launches), 7) == 7

    def test_a_loop_is_its_steps_by_turns(self, make: Make) -> None:
        memory = make("loop")
        register = ShiftRegister(memory)
        run = memory.loop(*register.launches)
        assert run is not None
        for steps in (0, 1, 2, 3, 50, 63, 3):
            assert register.place_after(run, steps) == steps
        captures = memory.counters.captures
        before = memory.counters.launches
        register.place_after(run, 50)
        assert memory.counters.captures == captures
        assert memory.counters.launches - before == 1

    def test_a_released_launch_frees_its_graph(self, make: Make) -> None:
        memory = make()
        _, enqueues = swap(memory)
        launches = [memory.capture(enqueue) for enqueue in enqueues]
        launches[0]()
        memory.release(launches[0], enqueues[0])
        assert list(memory.graphs._executables) == launches[1:]
        launches[1]()
        memory.read()

    def test_closing_twice_is_closing_once(self, make: Make) -> None:
        memory = make()
        mark = memory.mark()
        memory.write(memory.zeros((3,), F32), 1)
        launch = memory.capture(lambda: None)
        memory.close()
        memory.close()
        memory.release(launch)
        assert (memory.counters.device_bytes, memory.counters.pinned_bytes) == (0, 0)
        del mark
