"""Which modules of the package import which, read from their source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1] / "toolchain"


@cache
def modules() -> dict[str, Path]:
    """File by dotted name below `toolchain`, which itself is ""."""
    names = {file: file.relative_to(ROOT).with_suffix("").as_posix() for file in sorted(ROOT.rglob("*.py"))}
    return {name.removesuffix("__init__").rstrip("/").replace("/", "."): file for file, name in names.items()}


def room(module: str) -> str:
    """The package, or the module at the root, that a module is in."""
    return module.split(".")[0]


@cache
def imports(path: Path, *, types: bool = True, functions: bool = True) -> frozenset[str]:
    """Absolute dotted names that a file imports: modules, and of packages the modules or names taken from them.

    types      those under TYPE_CHECKING too
    functions  those within functions too
    """
    return frozenset(_imports(ast.parse(path.read_text()), types, functions))


def _imports(node: ast.AST, types: bool, functions: bool) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if not types and isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            for other in child.orelse:
                yield from _imports(ast.Module([other], []), types, functions)
            continue
        if not functions and isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom) and child.module:
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _imports(child, types, functions)


@cache
def neighbours(module: str, *, types: bool = True, functions: bool = True) -> frozenset[str]:
    """The modules of this package that a module imports."""
    names = imports(modules()[module], types=types, functions=functions)
    below = {name.removeprefix("toolchain.") for name in names if name.startswith("toolchain.")}
    return frozenset(name if name in modules() else name.rpartition(".")[0] for name in below) - {module, ""}
