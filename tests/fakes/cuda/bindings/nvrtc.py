# ruff: noqa: N801, N802, N803
"""The functions of `cuda.bindings.nvrtc` that this project calls. What it compiles it hands on as it is."""

from __future__ import annotations

from enum import IntEnum
from typing import Any

from . import _machine as machine
from .driver import CUBIN


class nvrtcResult(IntEnum):
    NVRTC_SUCCESS = 0
    NVRTC_ERROR_INVALID_OPTION = 5


class nvrtcProgram:
    def __init__(self, source: bytes) -> None:
        self.source = source


_OK = nvrtcResult.NVRTC_SUCCESS


def nvrtcCreateProgram(
    src: bytes, name: bytes, numHeaders: int, headers: Any, includeNames: Any
) -> tuple[nvrtcResult, nvrtcProgram]:
    if machine.failing("no_nvrtc"):
        raise RuntimeError('Failure finding "libnvrtc.so.13"')
    return _OK, nvrtcProgram(CUBIN + src)


def nvrtcCompileProgram(prog: nvrtcProgram, numOptions: int, options: list[bytes]) -> tuple[nvrtcResult]:
    known = numOptions == len(options) and options[0].startswith(b"--gpu-architecture=sm_")
    return (_OK if known else nvrtcResult.NVRTC_ERROR_INVALID_OPTION,)


def nvrtcGetCUBINSize(prog: nvrtcProgram) -> tuple[nvrtcResult, int]:
    return _OK, len(prog.source)


def nvrtcGetCUBIN(prog: nvrtcProgram, cubin: bytes) -> tuple[nvrtcResult]:
    """Writes into the bytes that it is given, as the binding does."""
    import ctypes

    ctypes.memmove(cubin, prog.source, len(prog.source))
    return (_OK,)


def nvrtcDestroyProgram(prog: nvrtcProgram) -> tuple[nvrtcResult]:
    return (_OK,)
