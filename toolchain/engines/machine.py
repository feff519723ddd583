"""Facts about this machine: for `diffbuild doctor`, and to note with measurements."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import DiffbuildError

if TYPE_CHECKING:
    from toolchain.engines.backend import Builder

LIBRARIES: dict[str, tuple[str, ...]] = {
    "generate": ("numpy", "tokenizers", "pillow"),
    "build": ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript", "huggingface-hub"),
    "check": ("polygraphy", "scikit-image", "scipy"),
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt", "cuda-python"),
    "tensorrt_rtx": ("tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13", "cuda-python"),
}
ALTERNATIVES = frozenset({"onnxruntime", "onnxruntime-gpu"})
"""One of these is enough."""
GPU_FIELDS = ("name", "compute_cap", "memory.total", "driver_version")


def examine(store: Path) -> dict[str, Any]:
    """All facts that `doctor` prints. `works` is whether at least one backend can run here."""
    from toolchain.engines.builders import BUILDERS
    from toolchain.engines.cpu import cpu_features, physical_cores
    from toolchain.engines.onnxruntime.package import clash
    from toolchain.engines.recommend import recommend
    from toolchain.engines.runners import RUNNERS
    from toolchain.engines.tensorrt.library import TENSORRT
    from toolchain.engines.tensorrt.run import advisory

    reasons = {name: runner.available() for name, runner in RUNNERS.items()}
    libraries = {use: {name: _version(name) for name in names} for use, names in LIBRARIES.items()}
    gpu_rows, no_gpu = gpus()
    return {
        "works": any(reason is None for reason in reasons.values()),
        "backends": {name: _backend(BUILDERS[name], reason) for name, reason in reasons.items()},
        "versions": {"diffbuild": _version("diffbuild"), "python": platform.python_version()},
        "libraries": libraries,
        "recommended": asdict(recommend(has_gpu=bool(gpu_rows))),
        "missing": {use: _missing(versions) for use, versions in libraries.items()},
        "system": _system(),
        "cpu": {"features": cpu_features(), "physical_cores": physical_cores()},
        "advisories": [line for line in [clash(), advisory(TENSORRT.installed())] if line],
        "gpus": gpu_rows,
        "no_gpu": no_gpu,
        "store": _store(store),
    }


def _backend(builder: Builder[Any], reason: str | None) -> dict[str, Any]:
    """`reason` is why it cannot run here; it may build all the same, and `device` is what it builds for."""
    try:
        device = builder.device()
    except (DiffbuildError, ImportError):
        device = None
    return {"works": reason is None, "reason": reason, "builds": device is not None, "device": device}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _missing(versions: Mapping[str, str | None]) -> list[str]:
    lacking = [name for name, number in versions.items() if number is None]
    have_one = any(versions.get(name) for name in ALTERNATIVES)
    return [name for name in lacking if not (have_one and name in ALTERNATIVES)]


def installed(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those of `packages` that are installed."""
    return {name: number for name in packages if (number := _version(name)) is not None}


def machine() -> dict[str, Any]:
    """The machine of a measurement, to be noted with its numbers."""
    from toolchain.engines.cpu import cpu_features, physical_cores

    return {
        "system": _system(),
        "cpu": _cpu_name(),
        "cpu_features": cpu_features(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "physical_cores": physical_cores(),
        "gpus": gpus()[0],
        "python": platform.python_version(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _system() -> str:
    return f"{platform.system()} {platform.release()} {platform.machine()}"


def _cpu_name() -> str:
    """What the processor calls itself."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def gpus() -> tuple[list[dict[str, str]], str | None]:
    """NVIDIA GPUs as nvidia-smi lists them, or why there are none."""
    query = ["nvidia-smi", f"--query-gpu={','.join(GPU_FIELDS)}", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except FileNotFoundError:
        return [], "nvidia-smi is not installed"
    except (OSError, subprocess.TimeoutExpired) as error:
        return [], f"nvidia-smi does not answer: {error}"
    if done.returncode:
        output = (done.stderr or done.stdout).strip().splitlines()
        return [], f"nvidia-smi: {output[0] if output else f'exit code {done.returncode}'}"
    rows = [[entry.strip() for entry in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
    listed = [dict(zip(("name", "compute_capability", "memory", "driver"), row, strict=False)) for row in rows]
    return listed, None if listed else "nvidia-smi lists none"


def _store(store: Path) -> dict[str, Any]:
    path = Path(os.path.abspath(store))
    existing = next(p for p in (path, *path.parents) if p.is_dir())
    writable = os.access(existing, os.W_OK | os.X_OK)
    return {
        "path": str(path),
        "exists": path.is_dir(),
        "writable": writable,
        "free_bytes": shutil.disk_usage(existing).free,
    }
