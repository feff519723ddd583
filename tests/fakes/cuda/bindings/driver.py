# ruff: noqa: N802, N803
"""The functions of `cuda.bindings.driver` that this project calls: one kernel, known by its name, in loaded modules."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from . import _machine as machine

CUBIN = b"the fake's cubin\0"


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_INVALID_IMAGE = 200
    CUDA_ERROR_NOT_FOUND = 500


class CUmodule(int):
    pass


class CUfunction(int):
    pass


_OK = CUresult.CUDA_SUCCESS


def cuModuleLoadData(image: bytes) -> tuple[CUresult, CUmodule | None]:
    if not image.startswith(CUBIN):
        return CUresult.CUDA_ERROR_INVALID_IMAGE, None
    handle = next(machine.HANDLES)
    machine.MODULES[handle] = image
    return _OK, CUmodule(handle)


def cuModuleGetFunction(hmod: CUmodule, name: bytes) -> tuple[CUresult, CUfunction | None]:
    if b"void " + name + b"(" not in machine.MODULES[int(hmod)]:
        return CUresult.CUDA_ERROR_NOT_FOUND, None
    return _OK, CUfunction(hmod)


def cuModuleUnload(hmod: CUmodule) -> tuple[CUresult]:
    if machine.MODULES.pop(int(hmod), None) is None:
        raise machine.violation("cuModuleUnload: no such module")
    return (_OK,)


def cuLaunchKernel(
    f: CUfunction,
    gridDimX: int,
    gridDimY: int,
    gridDimZ: int,
    blockDimX: int,
    blockDimY: int,
    blockDimZ: int,
    sharedMemBytes: int,
    hStream: int,
    kernelParams: tuple[tuple[int, int], tuple[Any, Any]],
    extra: int,
) -> tuple[CUresult]:
    """Does what `next_pass` does; only a graph with the condition may hold it."""
    (handle, left), kinds = kernelParams
    assert [kind.__name__ for kind in kinds] == ["c_ulong", "c_void_p"]
    assert (gridDimX, gridDimY, gridDimZ, blockDimX, blockDimY, blockDimZ) == (1, 1, 1, 1, 1, 1)
    stream = machine.STREAMS[int(hStream)]
    if stream.capture is None:
        raise machine.violation("cudaGraphSetConditional outside of a graph")

    def run() -> None:
        if int(f) not in machine.MODULES:
            raise machine.violation("a kernel runs after its module was unloaded")
        count = machine.view(left, 4, "next_pass").view("int32")
        count -= 1
        machine.CONDITIONS[handle][0] = int(count[0] > 0)

    machine.enqueue(stream, run, "next_pass")
    return (_OK,)
