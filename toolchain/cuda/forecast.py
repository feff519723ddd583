"""Whether engines will fit into a GPU's memory, said before it runs out, and how to tell that it did."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("toolchain")

MB = 1 << 20
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|MEM_ALLOC_FAILED|could not be allocated", re.I)
"""How TensorRT and CUDA say it."""
FEWER_BUCKETS = "keep fewer buckets open (toolchain.load(..., open_buckets=1)), or end what else uses the GPU"


def build_warning(weights_bytes: int, options: Mapping[str, Any], free_bytes: int) -> str | None:
    """Why a build may run out of GPU memory, and what would make it fit; None where nothing says so.

    A lower bound: the builder holds the weights as they are and as its kernels want them, and a kernel under test may
    take the whole workspace. What activations take is not known before.
    """
    least = 2 * weights_bytes
    workspace = options["workspace_mb"] * MB
    if least + workspace <= free_bytes:
        return None
    need = f"the build needs {(least + workspace) // MB} MB of GPU memory at least; {free_bytes // MB} MB are free"
    if least <= free_bytes:
        return f"{need}. Set tensorrt.workspace_mb to {(free_bytes - least) // MB} or less"
    return f"{need}. End what else uses the GPU, or keep the component's weights in a smaller dtype"


HOST_TIMES = 2.5
"""Host memory that the builder of TensorRT for RTX takes, in bytes per byte of weights: measured were 4.2 GB for the
1.7 GB of SD 1.5's denoiser, 11.6 for SDXL's 5.1 and 10.0 for SD 3.5 medium's 5.0."""


def host_build_warning(weights_bytes: int, free_bytes: int | None) -> str | None:
    """Why a build that needs no GPU may run out of host memory; None where nothing says so, or nobody knows."""
    need = int(HOST_TIMES * weights_bytes)
    if free_bytes is None or need <= free_bytes:
        return None
    return (
        f"the build needs about {need // MB} MB of memory; {free_bytes // MB} MB are free. End what else uses it, or "
        "keep the component's weights in a smaller dtype"
    )


def free_host_bytes() -> int | None:
    """Memory that processes can have without swapping; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) << 10
    except (OSError, StopIteration, ValueError):
        return None


def load_warning(weights_bytes: int, activation_bytes: int, free_bytes: int) -> str | None:
    """Why engines may not fit; None where nothing says so.

    weights_bytes     of all plans that are open at once; of a stripped plan, its weight file's
    activation_bytes  of the engine that takes the most: they share one block
    """
    need = weights_bytes + activation_bytes
    if need <= free_bytes:
        return None
    return (
        f"the engines need {need // MB} MB of GPU memory; {free_bytes // MB} MB are free. "
        f"{FEWER_BUCKETS[0].upper()}{FEWER_BUCKETS[1:]}"
    )


def warn_of_load(weights_bytes: int, activation_bytes: int, free_bytes: int) -> None:
    """Logs `load_warning`, where there is one."""
    warning = load_warning(weights_bytes, activation_bytes, free_bytes)
    if warning is not None:
        log.warning("%s", warning)


def largest_open(weights: Mapping[Path, int], open_buckets: int | None) -> int:
    """The most bytes of weights at once, of engines by their folders; a component opens so many of its, None: all."""
    by_component: dict[Path, list[int]] = {}
    for folder, size in weights.items():
        by_component.setdefault(folder.parent, []).append(size)
    return sum(sum(sorted(sizes, reverse=True)[:open_buckets]) for sizes in by_component.values())


def weight_bytes(component: Path) -> int:
    """Of the files that a component's engines are filled from: a bundle has them beside the engines."""
    return sum(file.stat().st_size for file in component.glob("*.safetensors"))
