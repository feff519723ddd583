"""The buffers of engines: in host memory, or on a GPU behind one stream.

The runtime works on a `Memory` alone and never asks which it is. On a GPU everything but `read` only enqueues: a
picture costs one synchronisation with the host, at its end.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from toolchain.errors import EngineError
from toolchain.signature import TensorSpec


class Buffer(Protocol):
    """A dense tensor in some memory, of fixed address and shape. numpy arrays are the buffers of the host."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Sizes of the axes."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """Element type."""

    def __getitem__(self, rows: int | slice, /) -> Any:
        """A view of one row, without the first axis, or of several: to copy from and to write to."""


AnyBuffer = TypeVar("AnyBuffer", bound=Buffer)


def check_buffer(tensor: TensorSpec, buffer: AnyBuffer | None, where: Path, *, also: str, fits: bool) -> AnyBuffer:
    """The buffer for a tensor of an engine. EngineError where it is missing or has another dtype or shape.

    also   what else is required of it, for the error; `fits` is whether that holds
    where  the engine's folder
    """
    expected = f"{tensor.name}: {tensor.dtype} {list(tensor.shape)}" + (f", {also}" if also else "")
    if buffer is None:
        raise EngineError("a buffer is missing", where=where, expected=expected)
    if str(buffer.dtype) != tensor.dtype or buffer.shape != tensor.shape or not fits:
        address = getattr(buffer, "address", None)
        got = f"{buffer.dtype} {list(buffer.shape)}" + ("" if address is None else f" at {address:#x}")
        raise EngineError("a buffer does not fit", where=where, expected=expected, got=got)
    return buffer


def check_array(tensor: TensorSpec, array: NDArray[Any] | None, where: Path) -> NDArray[Any]:
    """As `check_buffer`, of host memory whose address a library is given: the array must be contiguous."""
    contiguous = array is not None and array.flags.c_contiguous
    return check_buffer(tensor, array, where, also="contiguous", fits=contiguous)


class Memory(Protocol):
    """The memory of one pipeline. Its work happens in the order of the calls; not safe for concurrent use."""

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Any:
        """A new buffer, freed with the memory if not before."""

    def free(self, *buffers: Any) -> None:
        """Frees buffers that came from `zeros` and that no later launch or read uses."""

    def write(self, target: Any, value: ArrayLike) -> None:
        """Copies `value`, broadcast and cast to the buffer, into it. The caller may change `value` afterwards."""

    def copy(self, target: Any, source: Any) -> None:
        """Copies a buffer into another of the same shape and dtype."""

    def read(self, *sources: Any) -> list[NDArray[Any]]:
        """Copies of buffers on the host, after all work before it. Waits once for all of them."""

    def loop(self, first: Callable[[], None], second: Callable[[], None]) -> Callable[[int], None] | None:
        """What runs a number of steps, `first` and `second` by turns, as one launch; None where it is impossible."""

    def mark(self) -> Any:
        """A point in the order of the work; on a GPU an event."""

    def elapsed_ms(self, first: Any, second: Any) -> float:
        """Milliseconds of work between two marks; both must lie before a `read`."""

    def close(self) -> None:
        """Frees every buffer."""


class HostMemory:
    """`Memory` of numpy arrays: every call has done its work when it returns."""

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> NDArray[Any]:
        """A new array."""
        return np.zeros(shape, dtype)

    def free(self, *buffers: NDArray[Any]) -> None:
        """Nothing: arrays are freed with their last reference."""

    def write(self, target: NDArray[Any], value: ArrayLike) -> None:
        """Writes a value, broadcast and cast."""
        target[...] = value

    def copy(self, target: NDArray[Any], source: NDArray[Any]) -> None:
        """Copies an array into another."""
        target[...] = source

    def read(self, *sources: NDArray[Any]) -> list[NDArray[Any]]:
        """Copies of arrays."""
        return [source.copy() for source in sources]

    def loop(self, first: Callable[[], None], second: Callable[[], None]) -> None:
        """None: steps are launched one by one."""
        return

    def mark(self) -> float:
        """Now, in seconds."""
        return time.perf_counter()

    def elapsed_ms(self, first: float, second: float) -> float:
        """Milliseconds between two marks."""
        return (second - first) * 1e3

    def close(self) -> None:
        """Nothing: see `free`."""
