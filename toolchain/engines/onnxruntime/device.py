"""The CPU at hand: what ONNX Runtime's engines for it are tied to, and how many threads run them."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path
from typing import Any

from toolchain.engines.onnxruntime.package import module_version


@cache
def cpu_features() -> str:
    """The instruction set that decides ONNX Runtime's blocked layouts and kernels, such as "x86_64-avx512"."""
    flags = _flags()
    if not flags:
        return _machine()
    level = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "sse"
    return f"{_machine()}-{level}"


def saturates_int8() -> bool:
    """Whether sums of two products of uint8 and int8 are cut off at sixteen bits, as on x86 without VNNI."""
    return _machine() == "x86_64" and not _flags() & {"avx512_vnni", "avx_vnni"}


def _machine() -> str:
    return platform.machine().lower().replace("amd64", "x86_64")


def _flags() -> frozenset[str]:
    """What the CPU can do by Linux's names; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


def physical_cores() -> int:
    """Cores that this process may use, without counting hyper-threads."""
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    siblings = set()
    for cpu in allowed:
        try:
            siblings.add(Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text())
        except OSError:
            siblings.add(str(cpu))
    return max(1, len(siblings))


def cpu_device() -> dict[str, Any]:
    """What engines for this CPU are tied to. Raises EngineError where ONNX Runtime is not installed."""
    return {"kind": "cpu", "cpu": cpu_features(), "onnxruntime": module_version()}
