"""Which of its two packages brought ONNX Runtime.

They hold one module in one folder: the second to be installed writes over the first, and to remove either takes the
files of both away.
"""

from __future__ import annotations

import logging
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from toolchain.errors import EngineError

log = logging.getLogger("toolchain")

CPU, GPU = "onnxruntime", "onnxruntime-gpu"
EXTRAS = {CPU: "cpu", GPU: "cuda"}
EITHER = "pip install 'diffbuild[cpu]', or for an NVIDIA GPU pip install 'diffbuild[cuda]'"


def installed() -> dict[str, str]:
    """Package -> version, of those of the two that are installed."""
    found = {}
    for package in (CPU, GPU):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def module_version() -> str:
    """The version of ONNX Runtime, by whatever package it came. EngineError where there is none."""
    if find_spec("onnxruntime") is None:
        raise EngineError("ONNX Runtime is not installed", hint=EITHER)
    found = installed()
    if len(found) == 1:
        return next(iter(found.values()))
    import onnxruntime  # of two packages the one that was installed last, or one under another name

    return str(onnxruntime.__version__)


def clash() -> str | None:
    """What is wrong where both packages are installed, and what mends it; None where they are not."""
    found = installed()
    if len(found) < 2:
        return None
    both = " and ".join(f"{package} {number}" for package, number in found.items())
    mend = f"pip uninstall -y {' '.join(found)}, then {_extra(CPU)}, or {_extra(GPU)}"
    return f"{both} are both installed, and write over each other's files: {mend}"


@cache
def warn_of_clash() -> None:
    """Once in a process."""
    if said := clash():
        log.warning("%s", said)


def command(package: str, number: str | None = None) -> str:
    """What brings one of the packages, of any version that is driven or of that one, and removes the other first."""
    found = installed()
    removed = f"pip uninstall -y {' '.join(found)} && " if found.keys() - {package} else ""
    return removed + (_extra(package) if number is None else f"pip install {package}=={number}")


def _extra(package: str) -> str:
    return f"pip install 'diffbuild[{EXTRAS[package]}]'"
