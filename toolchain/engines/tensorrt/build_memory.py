"""Whether a build will fit into the memory of the GPU or of the host, said before it runs out."""

from __future__ import annotations

from pathlib import Path

from toolchain.recipe.options import TensorRtOptions

MB = 1 << 20
HOST_TIMES = 2.5
"""Host memory that the builder of TensorRT for RTX takes, in bytes per byte of weights: measured were 4.2 GB for the
1.7 GB of SD 1.5's denoiser, 11.6 for SDXL's 5.1 and 10.0 for SD 3.5 medium's 5.0."""


def build_warning(weights_bytes: int, options: TensorRtOptions, free_bytes: int) -> str | None:
    """Why a build may run out of GPU memory, and what would make it fit; None where nothing says so.

    A lower bound: the builder holds the weights as they are and as its kernels want them, and a kernel under test may
    take the whole workspace. What activations take is not known before.
    """
    least = 2 * weights_bytes
    workspace = options.workspace_mb * MB
    if least + workspace <= free_bytes:
        return None
    need = f"the build needs {(least + workspace) // MB} MB of GPU memory at least; {free_bytes // MB} MB are free"
    if least <= free_bytes:
        return f"{need}. Set tensorrt.workspace_mb to {(free_bytes - least) // MB} or less"
    return f"{need}. End what else uses the GPU, or keep the component's weights in a smaller dtype"


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
