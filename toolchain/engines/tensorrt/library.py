"""NVIDIA's two libraries that this package drives, TensorRT and TensorRT for RTX, and what differs between them.

Both have the same interface in Python, under names of their own. TensorRT for RTX compiles for whole generations of
GPUs, on any machine and without a GPU; kernels are finished on the user's GPU when an engine is opened.
"""

from __future__ import annotations

import ctypes
import importlib
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toolchain.errors import EngineError

Version = tuple[int, ...]

OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|MEM_ALLOC_FAILED|could not be allocated", re.I)
"""How TensorRT and CUDA say it."""

BINDINGS, LIBRARIES = "tensorrt-rtx-cu13-bindings", "onnxruntime-ep-nv-tensorrt-rtx-cu13"
"""Packages of the public index that hold the two halves of TensorRT for RTX."""
PAIR = f"pip install {BINDINGS}==1.7.1.116 {LIBRARIES}==0.5.0"
"""Versions of the two halves that belong together and that were tested."""
SHARED_OBJECTS = ("libcudart.so", "libtensorrt_rtx.so", "libtensorrt_onnxparser_rtx.so")
"""In the order in which they must be loaded."""


@dataclass(frozen=True)
class Library:
    """One of the two libraries.

    backend       name of the backend and of its table in a recipe
    title         what messages call it
    oldest        first supported version
    newest        first version that is no longer supported
    install       the command that installs it
    portable      whether engines are for generations of GPUs: built without one, and finished where they are opened
    load          imports the module
    exactly       the command that installs a given version, None where it is not known
    """

    backend: str
    title: str
    oldest: Version
    newest: Version
    install: str
    portable: bool
    load: Callable[[], Any]
    exactly: Callable[[str], str | None]

    def module(self) -> Any:
        """The module `tensorrt` or its counterpart. EngineError where it, or a library below it, is missing."""
        try:
            return self.load()
        except (ImportError, OSError) as error:  # OSError: a binding without its libraries
            raise EngineError(f"{self.title} cannot be imported", got=error, hint=_mend(error, self.install)) from error

    def version(self) -> str:
        """The installed version. EngineError as `module`, and for a version that is not supported."""
        version = str(self.module().__version__)
        if not self.oldest <= numbers(version) < self.newest:
            wanted = f"{self.title} {'.'.join(map(str, self.oldest))} or newer, below {'.'.join(map(str, self.newest))}"
            raise EngineError(f"{wanted} is needed", got=f"{self.title} {version}", hint=self.install)
        return version

    def installed(self) -> str | None:
        """The installed version, supported or not; None where there is none."""
        try:
            return str(self.module().__version__)
        except EngineError:
            return None


def numbers(version: str) -> Version:
    """The numbers of a version or of a compute capability, to be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version))


def _mend(error: Exception, install: str) -> str:
    if "libstdc++" in str(error):
        return "install the C++ runtime of the system: apt-get install libstdc++6"
    return install


def _tensorrt() -> Any:
    import tensorrt

    return tensorrt


def _tensorrt_rtx() -> Any:
    """NVIDIA's own package, which holds bindings and libraries, or else the two halves of the public index."""
    if find_spec("tensorrt_rtx") is not None:
        return importlib.import_module("tensorrt_rtx")
    if find_spec("tensorrt_rtx_bindings") is None:
        raise ImportError("neither tensorrt_rtx nor tensorrt_rtx_bindings is installed")
    _load_shared_objects()
    return importlib.import_module("tensorrt_rtx_bindings")


@cache
def _load_shared_objects() -> None:
    """Loads the libraries for the bindings to find. EngineError for two halves that do not belong together."""
    folder = _libraries()
    objects = [_shared_object(folder, name) for name in SHARED_OBJECTS]
    libraries, bindings = objects[1].name.partition(".so.")[2], _installed(BINDINGS)
    if bindings is not None and numbers(bindings)[:3] != numbers(libraries)[:3]:
        raise EngineError(
            "the two halves of TensorRT for RTX are of two versions",
            where=folder,
            expected=f"libraries of {BINDINGS} {bindings}",
            got=f"version {libraries}, which {LIBRARIES} {_installed(LIBRARIES)} brings",
            hint=PAIR,
        )
    for path in objects:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


def _libraries() -> Path:
    spec = find_spec("onnxruntime_ep_nv_tensorrt_rtx")
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(f"the libraries of TensorRT for RTX are not installed: {LIBRARIES} brings them")
    return Path(spec.submodule_search_locations[0])


def _shared_object(folder: Path, name: str) -> Path:
    """The file of a library, whose name ends in its version: the package makes links of shorter names beside it."""
    files = [path for path in folder.glob(f"{name}*") if not path.is_symlink()]
    if not files:
        raise ImportError(f"{folder} holds no {name}")
    return files[0]


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


TENSORRT = Library(
    backend="tensorrt",
    title="TensorRT",
    oldest=(10, 13),
    newest=(12,),
    install="pip install 'diffbuild[tensorrt]'",
    portable=False,
    load=_tensorrt,
    exactly=lambda version: f"pip install tensorrt=={version}",
)
TENSORRT_RTX = Library(
    backend="tensorrt_rtx",
    title="TensorRT for RTX",
    oldest=(1, 7),
    newest=(2,),
    install="pip install 'diffbuild[rtx]'",
    portable=True,
    load=_tensorrt_rtx,
    exactly=lambda version: PAIR if f"{BINDINGS}=={version} " in PAIR else None,  # which halves others have is not told
)
LIBRARIES_BY_BACKEND = {library.backend: library for library in (TENSORRT, TENSORRT_RTX)}
