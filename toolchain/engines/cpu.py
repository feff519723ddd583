"""The CPU at hand: what it can do, and how many threads run an engine on it."""

from __future__ import annotations

import os
import platform
from functools import cache
from pathlib import Path


@cache
def cpu_features() -> str:
    """The instruction set that decides blocked layouts and kernels, such as "x86_64-avx512"."""
    flags = cpu_flags()
    if not flags:
        return cpu_architecture()
    level = "avx512" if "avx512f" in flags else "avx2" if "avx2" in flags else "sse"
    return f"{cpu_architecture()}-{level}"


def cpu_architecture() -> str:
    """Such as "x86_64" or "aarch64"."""
    return platform.machine().lower().replace("amd64", "x86_64")


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do by Linux's names; empty where it does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line.split() for line in lines if line.startswith("flags")), ()))


def saturates_int8() -> bool:
    """Whether sums of two products of uint8 and int8 are cut off at sixteen bits, as on x86 without VNNI."""
    return cpu_architecture() == "x86_64" and not cpu_flags() & {"avx512_vnni", "avx_vnni"}


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
