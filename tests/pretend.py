"""The fakes of tests/fakes in place of NVIDIA's modules, in this process and in those that it starts."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from unittest import mock

FAKES = Path(__file__).parent / "fakes"
FAKED = ("tensorrt", "tensorrt_rtx", "cuda")


@contextlib.contextmanager
def pretended(**variables: str) -> Iterator[ModuleType]:
    """Gives the fake `tensorrt`, under environment variables such as FAKE_TENSORRT_VERSION; all is undone at the end.

    Modules of toolchain's cuda and engines that were imported meanwhile hold the fake, and are forgotten with it.
    """
    path = os.pathsep.join(p for p in (str(FAKES), os.environ.get("PYTHONPATH")) if p)
    kept = {name: module for name, module in sys.modules.items() if name.split(".")[0] in FAKED}
    known = set(sys.modules) - set(kept)
    for name in kept:
        del sys.modules[name]
    with mock.patch.dict(os.environ, {"PYTHONPATH": path, **variables}), mock.patch.object(sys, "path", [*sys.path]):
        sys.path.insert(0, str(FAKES))
        importlib.invalidate_caches()
        try:
            yield importlib.import_module("tensorrt")
        finally:
            for name in set(sys.modules) - known:
                if name.split(".")[0] in FAKED or name.startswith(("toolchain.cuda.", "toolchain.engines.")):
                    del sys.modules[name]
            sys.modules.update(kept)
