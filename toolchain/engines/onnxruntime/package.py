"""Which of its two packages ONNX Runtime was installed from.

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
    versions = {}
    for package in (CPU, GPU):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions


def module_version() -> str:
    """The version of ONNX Runtime, whichever package it is from. EngineError where it is not installed."""
    if find_spec("onnxruntime") is None:
        raise EngineError("ONNX Runtime is not installed", hint=EITHER)
    versions = installed()
    if len(versions) == 1:
        return next(iter(versions.values()))
    import onnxruntime  # of two packages the one that was installed last, or one under another name

    return str(onnxruntime.__version__)


def clash() -> str | None:
    """A message with the remedy where both packages are installed, else None."""
    versions = installed()
    if len(versions) < 2:
        return None
    both = " and ".join(f"{package} {number}" for package, number in versions.items())
    remedy = f"pip uninstall -y {' '.join(versions)}, then {_extra(CPU)}, or {_extra(GPU)}"
    return f"{both} are both installed, and write over each other's files: {remedy}"


@cache
def warn_of_clash() -> None:
    """Logs `clash`, once in a process."""
    if message := clash():
        log.warning("%s", message)


def command(package: str, number: str | None = None) -> str:
    """The command that removes the other package and installs this one, as version `number` or any supported one."""
    versions = installed()
    removed = f"pip uninstall -y {' '.join(versions)} && " if versions.keys() - {package} else ""
    return removed + (_extra(package) if number is None else f"pip install {package}=={number}")


def _extra(package: str) -> str:
    return f"pip install 'diffbuild[{EXTRAS[package]}]'"
