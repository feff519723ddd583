"""diffbuild: diffusion models compiled ahead of time. Importing this package imports nothing heavy.

import toolchain

pipe = toolchain.load("bundle")
pipe("a red circle on a white background", seed=0).images[0].save("a.png")
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from toolchain.api import build, check_bundle, export_graphs, plan_build
    from toolchain.bundle.bundle import Bundle, read_bundle
    from toolchain.bundle.signing import sign_bundle, verify_bundle
    from toolchain.errors import DiffbuildError
    from toolchain.recipe import Bucket, Recipe, load_recipe
    from toolchain.runtime.observer import Observer
    from toolchain.runtime.pipeline import Pipeline, load
    from toolchain.runtime.progress import Progress
    from toolchain.runtime.result import Result

# ONNX Runtime 1.29 and newer reports every session that it opens to Microsoft, and writes an identifier of the machine
# and a database of events to the user's home, from the moment it is imported. Here that is the user's decision: set to
# 0 before this package is imported, it stays on.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

_HOME = {
    "build": "toolchain.api",
    "check_bundle": "toolchain.api",
    "export_graphs": "toolchain.api",
    "plan_build": "toolchain.api",
    "Bundle": "toolchain.bundle.bundle",
    "read_bundle": "toolchain.bundle.bundle",
    "DiffbuildError": "toolchain.errors",
    "Bucket": "toolchain.recipe",
    "Recipe": "toolchain.recipe",
    "load_recipe": "toolchain.recipe",
    "Observer": "toolchain.runtime.observer",
    "Pipeline": "toolchain.runtime.pipeline",
    "Progress": "toolchain.runtime.progress",
    "Result": "toolchain.runtime.result",
    "load": "toolchain.runtime.pipeline",
    "sign_bundle": "toolchain.bundle.signing",
    "verify_bundle": "toolchain.bundle.signing",
}

__version__: str
__all__ = [
    "Bucket",
    "Bundle",
    "DiffbuildError",
    "Observer",
    "Pipeline",
    "Progress",
    "Recipe",
    "Result",
    "__version__",
    "build",
    "check_bundle",
    "export_graphs",
    "load",
    "load_recipe",
    "plan_build",
    "read_bundle",
    "sign_bundle",
    "verify_bundle",
]


def __getattr__(name: str) -> Any:
    import importlib
    from importlib import metadata

    if name == "__version__":
        return metadata.version("diffbuild")
    if name not in _HOME:
        raise AttributeError(f"module 'toolchain' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return [*__all__, *(name for name in globals() if name.startswith("__"))]
