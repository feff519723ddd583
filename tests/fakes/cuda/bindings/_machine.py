"""The pretended GPU below `cuda.bindings`: memory that knows its owners, streams that run late, graphs that replay.

Device pointers are real host addresses, so that what a fake kernel computes can be read back. Everything that is wrong
on a real GPU but would pass unnoticed here raises `Violation`, which no caller catches, and stays in `VIOLATIONS`.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

ALIGNMENT = 256
POISON, FREED = 0xA5, 0xDD
QUARANTINE = 64  # freed blocks whose addresses are not given out again yet, so that stale pointers are seen
POISON_LIMIT = 64 << 20  # a larger block keeps the system's lazy zeros: pretended gigabytes cost no memory

VIOLATIONS: list[str] = []


class Violation(AssertionError):  # noqa: N818
    """The program did what a GPU punishes with wrong results."""


def violation(what: str) -> Violation:
    VIOLATIONS.append(what)
    return Violation(what)


def failing(what: str) -> bool:
    """Whether FAKE_CUDA_FAIL, a list with commas, asks for this failure."""
    return what in os.environ.get("FAKE_CUDA_FAIL", "").split(",")


@dataclass
class Block:
    address: int
    nbytes: int
    kind: str  # "device" or "pinned"
    backing: np.ndarray[Any, Any] = field(repr=False)


class Heap:
    """Live blocks by address."""

    def __init__(self) -> None:
        self._blocks: dict[int, Block] = {}
        self._starts: list[int] = []
        self._freed: deque[Block] = deque(maxlen=QUARANTINE)

    def allocate(self, nbytes: int, kind: str) -> int:
        size = max(nbytes, 1)
        backing = np.zeros(size + ALIGNMENT, np.uint8)
        if size <= POISON_LIMIT:
            backing[:] = POISON
        address = -(-backing.ctypes.data // ALIGNMENT) * ALIGNMENT
        self._blocks[address] = Block(address, size, kind, backing)
        bisect.insort(self._starts, address)
        return address

    def free(self, address: int, kind: str) -> bool:
        block = self._blocks.get(address)
        if block is None or block.kind != kind:
            return False
        if block.nbytes <= POISON_LIMIT:
            block.backing[:] = FREED
            self._freed.append(block)
        del self._blocks[address]
        self._starts.remove(address)
        return True

    def owner(self, address: int, nbytes: int) -> Block | None:
        at = bisect.bisect_right(self._starts, address) - 1
        if at < 0:
            return None
        block = self._blocks[self._starts[at]]
        return block if address + nbytes <= block.address + block.nbytes else None

    def used(self, kind: str) -> int:
        return sum(b.nbytes for b in self._blocks.values() if b.kind == kind)

    def live(self) -> list[Block]:
        return list(self._blocks.values())


HEAP = Heap()
HANDLES = itertools.count(0x1000)


def view(address: int, nbytes: int, what: str, kind: str = "device") -> np.ndarray[Any, Any]:
    """The bytes at an address, which must lie in one live block of this kind."""
    block = HEAP.owner(address, nbytes)
    if block is None:
        raise violation(f"{what}: {nbytes} bytes at {address:#x} lie in no live block")
    if block.kind != kind:
        raise violation(f"{what}: {address:#x} is {block.kind} memory, not {kind}")
    start = address - block.backing.ctypes.data
    return block.backing[start : start + nbytes]


@dataclass
class Work:
    """Something enqueued: `run` does it, `what` names it."""

    run: Callable[[], None]
    what: str


@dataclass
class Graph:
    handle: int
    work: list[Work] = field(default_factory=list)
    nested: bool = False  # the body of a conditional node: destroyed with its graph


@dataclass
class Executable:
    handle: int
    work: tuple[Work, ...]


@dataclass
class Stream:
    handle: int
    queue: deque[Work] = field(default_factory=deque)
    capture: Graph | None = None
    invalid: bool = False  # the capture was spoilt; it ends in an error

    def drain(self) -> None:
        while self.queue:
            self.queue.popleft().run()


@dataclass
class Event:
    handle: int
    stream: Stream | None = None
    time: float | None = None


STREAMS: dict[int, Stream] = {}
EVENTS: dict[int, Event] = {}
GRAPHS: dict[int, Graph] = {}
EXECUTABLES: dict[int, Executable] = {}
CONDITIONS: dict[int, list[int]] = {}  # handle -> [its value, what a launch starts with]
MODULES: dict[int, bytes] = {}


def capturing() -> list[Stream]:
    return [s for s in STREAMS.values() if s.capture is not None]


def enqueue(stream: Stream, run: Callable[[], None], what: str) -> None:
    work = Work(run, what)
    if stream.capture is not None:
        stream.capture.work.append(work)
    else:
        stream.queue.append(work)


def live() -> list[str]:
    """What is still allocated, as lines for a test to show."""
    found = [f"{b.kind} block of {b.nbytes} bytes" for b in HEAP.live()]
    found += [f"stream {h}" for h in STREAMS] + [f"event {h}" for h in EVENTS]
    found += [f"graph {h}" for h, g in GRAPHS.items() if not g.nested]
    found += [f"module {h}" for h in MODULES]
    return found + [f"executable graph {h}" for h in EXECUTABLES]
