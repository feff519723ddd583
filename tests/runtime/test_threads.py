"""One pipeline and many threads: each gets what it asked for, in the order in which they asked."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from toolchain.bundle.bundle import read_bundle
from toolchain.engines.backend import Buffers
from toolchain.engines.onnxruntime.run import OnnxRuntimeRunner
from toolchain.errors import RequestError
from toolchain.runtime.lock import FairLock
from toolchain.runtime.pipeline import Pipeline
from toolchain.signature import GraphSpec

THREADS, CALLS = 64, 50
WORDS = ("a", "red", "blue", "circle", "square", "on", "white", "background")


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> Iterator[toolchain.Pipeline]:
    with_one_open = toolchain.load(tiny_bundle, open_buckets=1)
    yield with_one_open
    with_one_open.close()


def started(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def until(reached: Callable[[], bool]) -> None:
    end = time.monotonic() + 30
    while not reached():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.001)


class Sums:
    """An engine that takes microseconds: each output depends on every input, and other threads run meanwhile."""

    def __init__(self, spec: GraphSpec) -> None:
        self.spec = spec

    def bind(self, buffers: Buffers) -> Callable[[], None]:
        inputs = [buffers[tensor.name] for tensor in self.spec.inputs]
        weights = [np.cos(np.arange(array.size)) for array in inputs]
        outputs = [buffers[tensor.name] for tensor in self.spec.outputs if tensor.name in buffers]

        def launch() -> None:
            total = 0.0
            for array, weight in zip(inputs, weights, strict=True):
                total += float(array.ravel() @ weight)
                time.sleep(0)
            for place, array in enumerate(outputs, start=1):
                array[...] = 100 * np.sin(total + place)
                time.sleep(0)

        return launch

    def close(self) -> None:
        self.spec = None  # type: ignore[assignment]


class Summing(OnnxRuntimeRunner):
    """A backend that opens `Sums`."""

    def open(self, folder: Path, weights: object, spec: GraphSpec, options: object, memory: object, **_: Any) -> Any:
        return Sums(spec)


def test_every_thread_gets_its_own_pictures(tiny_bundle: Path) -> None:
    """Prompts differ from thread to thread, seeds and guidance from call to call."""
    pipe = Pipeline(read_bundle(tiny_bundle), open_buckets=1, backend=Summing())

    def latents(thread: int, call: int) -> np.ndarray:
        prompt = f"a {WORDS[thread % 8]} {WORDS[thread // 8]}"
        drawn = pipe(prompt, seed=call % 2, guidance=2.0 + call % 2, steps=1, scheduler="euler", decode=False)
        assert drawn.request.prompts == [prompt]
        return drawn.latents

    alone = [[latents(thread, call) for call in range(2)] for thread in range(THREADS)]
    assert len({a.tobytes() for pair in alone for a in pair}) == 2 * THREADS
    together = threading.Barrier(THREADS)

    def caller(thread: int) -> int:
        together.wait()
        return sum(np.array_equal(latents(thread, call), alone[thread][call % 2]) for call in range(CALLS))

    with ThreadPoolExecutor(THREADS) as pool:
        equal = list(pool.map(caller, range(THREADS)))
    assert equal == [CALLS] * THREADS


def test_sizes_and_callbacks_of_threads_do_not_mix(pipe: toolchain.Pipeline) -> None:
    """With one bucket open every other call closes the engines of the one before."""

    def drawn(number: int) -> tuple[np.ndarray, list[np.ndarray]]:
        seen: list[np.ndarray] = []
        size = ((64, 64), (64, 96))[number % 2]
        result = pipe(
            WORDS[number], seed=number, size=size, steps=4, scheduler="euler", callback=lambda p: seen.append(p.latents)
        )
        return np.asarray(result.images[0]), seen

    alone = [drawn(number) for number in range(4)]
    with ThreadPoolExecutor(4) as pool:
        for (picture, steps), (expected, expected_steps) in zip(pool.map(drawn, range(4)), alone, strict=True):
            assert np.array_equal(picture, expected)
            assert len(steps) == 4
            assert all(np.array_equal(a, b) for a, b in zip(steps, expected_steps, strict=True))


def test_asyncio_to_thread(pipe: toolchain.Pipeline) -> None:
    async def both() -> list[toolchain.Result]:
        return await asyncio.gather(*(asyncio.to_thread(pipe, word, seed=5, steps=1) for word in WORDS))

    for word, result in zip(WORDS, asyncio.run(both()), strict=True):
        assert np.array_equal(result.latents, pipe(word, seed=5, steps=1).latents)


def test_calls_are_served_in_the_order_in_which_they_came(pipe: toolchain.Pipeline) -> None:
    served: list[int] = []
    threads: list[threading.Thread] = []

    def one(number: int) -> None:
        pipe("a", seed=0, steps=1, decode=False, callback=lambda progress: served.append(number))

    with pipe._lock:
        for number in range(20):
            threads.append(started(lambda number=number: one(number)))
            until(lambda: len(pipe._lock._waiting) == len(threads))
    for thread in threads:
        thread.join(30)
    assert served == list(range(20))


def test_who_asks_again_stands_behind_those_who_wait() -> None:
    """With `threading.Lock` a thread that never pauses takes the lock again before another wakes up."""
    lock, order, two = FairLock(), [], threading.Barrier(2)

    def work(name: str) -> None:
        two.wait()
        for _ in range(100):
            with lock:
                order.append(name)
                until(lambda: bool(lock._waiting) or len(order) > 190)

    threads = [started(lambda name=name: work(name)) for name in "ab"]
    for thread in threads:
        thread.join(30)
    assert order[1:190] == [{"a": "b", "b": "a"}[name] for name in order[:189]]


def test_a_call_waits_for_no_time_of_its_own(pipe: toolchain.Pipeline) -> None:
    """What it waited for others is not counted."""
    results: list[toolchain.Result] = []
    with pipe._lock:
        thread = started(lambda: results.append(pipe("a", seed=0, steps=1)))
        until(lambda: bool(pipe._lock._waiting))
        time.sleep(0.6)
    thread.join(30)
    assert results[0].timings.total_ms < 600


@pytest.mark.parametrize(
    "inner",
    [
        lambda pipe: pipe("a", seed=0, steps=1),
        lambda pipe: pipe.warm_up(),
        lambda pipe: pipe.forget_prompts(),
        lambda pipe: pipe.table("euler", 4, (64, 64)),
        lambda pipe: pipe.close(),
    ],
    ids=["call", "warm_up", "forget_prompts", "table", "close"],
)
def test_a_callback_may_not_use_its_own_pipeline(
    pipe: toolchain.Pipeline, inner: Callable[[toolchain.Pipeline], Any]
) -> None:
    expected = pipe("a red circle", seed=1, steps=4)
    with pytest.raises(RequestError, match="from inside its own call") as error:
        pipe("a red circle", seed=1, steps=4, callback=lambda progress: inner(pipe) and None)
    assert "second pipeline" in str(error.value)
    # Nothing is left of it: neither a held lock nor closed engines.
    assert np.array_equal(pipe("a red circle", seed=1, steps=4).latents, expected.latents)


def test_a_callback_may_use_another_pipeline(pipe: toolchain.Pipeline, tiny_bundle: Path) -> None:
    other = toolchain.load(tiny_bundle, warm_up=False, open_buckets=1)
    inner: list[np.ndarray] = []
    outer = pipe(
        "a", seed=1, steps=1, callback=lambda progress: inner.append(other("blue", seed=2, steps=1).latents) or None
    )
    assert np.array_equal(outer.latents, pipe("a", seed=1, steps=1).latents)
    assert np.array_equal(inner[0], pipe("blue", seed=2, steps=1).latents)
    other.close()


def test_latents_of_a_step_are_not_those_of_a_later_one(pipe: toolchain.Pipeline) -> None:
    kept: list[toolchain.Progress] = []
    pipe("a", seed=0, steps=4, callback=kept.append)
    for progress in kept:
        with pytest.raises(RequestError, match="read after its callback"):
            progress.latents  # noqa: B018


def test_a_failing_callback_lets_the_next_thread_on(pipe: toolchain.Pipeline) -> None:
    def fail(progress: toolchain.Progress) -> None:
        raise ValueError("the caller's own")

    with pytest.raises(ValueError, match="the caller's own"):
        pipe("a", seed=0, steps=4, callback=fail)
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(pipe, "a", seed=0, steps=1).result(30).latents.shape == (1, 4, 8, 8)


def test_close_waits_for_the_calls_before_it_and_refuses_those_after(tiny_bundle: Path) -> None:
    pipe = toolchain.load(tiny_bundle, warm_up=False, open_buckets=1)
    done: list[Any] = []

    def late() -> None:
        with pytest.raises(RequestError, match="the pipeline is closed") as error:
            pipe("a", seed=0, steps=1)
        done.append(error.value)

    with pipe._lock:
        threads = []
        for work in (lambda: done.append(pipe("a", seed=0, steps=1)), pipe.close, late):
            threads.append(started(work))
            until(lambda: len(pipe._lock._waiting) == len(threads))
    for thread in threads:
        thread.join(30)
    assert isinstance(done[0], toolchain.Result)
    assert "toolchain.load" in str(done[1])
    pipe.close()  # twice is once
    for use in (pipe.warm_up, pipe.forget_prompts, lambda: pipe.table("euler", 4, (64, 64))):
        with pytest.raises(RequestError, match="the pipeline is closed"):
            use()


def test_who_is_interrupted_while_waiting_leaves_the_queue() -> None:
    code = """
import signal, threading, time
from toolchain.runtime.lock import FairLock
from toolchain.runtime.pipeline import Pipeline
lock, order = FairLock(), []
def waits():
    with lock:
        order.append("served")
def holds():
    with lock:
        while len(lock._waiting) < 1: time.sleep(0.001)
        second = threading.Thread(target=waits)
        second.start()
        while len(lock._waiting) < 2: time.sleep(0.001)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        while len(lock._waiting) > 1: time.sleep(0.001)
    second.join()
first = threading.Thread(target=holds)
first.start()
try:
    while not lock._holder: time.sleep(0.001)
    with lock:
        order.append("interrupted too late")
except KeyboardInterrupt:
    order.append("gave up")
first.join()
print(order)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=30)
    assert done.stdout.strip() == "['gave up', 'served']", done.stderr


def test_two_threads_that_make_schedulers_leave_the_log_as_it_was() -> None:
    from diffusers.utils import logging as diffusers_logging

    from toolchain.sampler.silence import quiet

    before = diffusers_logging.get_verbosity()
    inside, leave = threading.Event(), threading.Event()

    def first() -> None:
        with quiet():
            inside.set()
            leave.wait(30)

    def second() -> None:
        with quiet():
            assert diffusers_logging.get_verbosity() == logging.CRITICAL

    one = started(first)
    inside.wait(30)
    two = started(second)
    time.sleep(0.05)
    leave.set()
    one.join(30)
    two.join(30)
    assert diffusers_logging.get_verbosity() == before
    assert "diffusers" in sys.modules
