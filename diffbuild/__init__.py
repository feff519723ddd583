"""`import diffbuild`: the interface of `toolchain`, under the name that pip knows. Nothing heavy is imported."""

from typing import TYPE_CHECKING

from toolchain import __all__, __dir__, __getattr__  # noqa: F401

if TYPE_CHECKING:
    from toolchain import *  # noqa: F403
