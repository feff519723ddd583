"""The folder list is the sentence: who may import whom, and what may not be imported at run time."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.imports import ROOT, imports, modules, neighbours, room

# Each row may import from the rows above it and from itself.
LAYERS = (
    ("errors", "garbage", "terminal"),
    ("recipe", "settings", "signature", "store", "graph", "precision", "sampler"),
    ("weights",),
    ("cuda", "models", "bundle"),
    ("export", "engines"),
    ("builder", "runtime"),
    ("check",),
    ("bench", "trace", "tune"),
    ("api",),
    ("cli",),
    ("__init__",),
)
RUNTIME_NEEDS = {
    *("errors", "recipe", "settings", "signature", "store", "weights", "sampler"),
    *("bundle", "engines", "runtime"),
}
OWNERS = {
    "tensorrt": {"engines"},
    "cuda": {"cuda"},
    "polygraphy": {"check"},
    "skimage": {"check"},
    "flip_evaluator": {"check"},
    "diffusers": {"models", "sampler", "check", "bench"},
    "transformers": {"models", "check"},
    "onnxscript": {"graph"},
    "huggingface_hub": {"models"},
    "openvino": {"engines"},
    "click": {"cli", "terminal"},
    "cryptography": {"bundle"},
    "rich": {"cli"},
}
EVERY = sorted(modules())


@pytest.mark.parametrize("module", [module for module in EVERY if module])
def test_imports_point_upwards(module: str) -> None:
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert room(module) in rank, f"{room(module)} has no place in LAYERS"
    for name in neighbours(module):
        assert rank[room(name)] <= rank[room(module)], f"{module} imports {name}, which is below it"


@pytest.mark.parametrize("module", [module for module in EVERY if module])
def test_imports_name_their_module(module: str) -> None:
    """The interface's names, which are looked up when they are used, would hide what they bring along."""
    names = imports(modules()[module])
    assert "toolchain" not in names
    assert not {n for n in names if n.startswith("toolchain.") and n.count(".") == 1} - {
        f"toolchain.{m}" for m in EVERY
    }


def defined(path: Path) -> set[str]:
    """Names that a module has at its top level."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("folder", ["benchmarks", "examples"])
def test_scripts_import_what_exists(folder: str) -> None:
    """They are run by hand, and no type checker reads them."""
    for path in sorted((ROOT.parent / folder).rglob("*.py")):
        for name in imports(path):
            module, _, attribute = name.removeprefix("toolchain.").rpartition(".")
            if name.startswith("toolchain.") and name.removeprefix("toolchain.") not in modules():
                assert module in modules(), f"{path.name} imports {name}"
                assert module == "" or attribute in defined(modules()[module]), f"{path.name} imports {name}"


def test_there_is_no_circle() -> None:
    """Imports within functions and for type checkers count, and so do those within one room."""
    waiting = {module: set(neighbours(module)) for module in EVERY if module}
    while free := {module for module, names in waiting.items() if not names & waiting.keys()}:
        for module in free:
            del waiting[module]
    assert not waiting, "in a circle, or above one"


def test_rooms_form_no_circle() -> None:
    waiting = {r: {room(n) for m in EVERY if room(m) == r for n in neighbours(m)} - {r} for r in map(room, EVERY) if r}
    while free := {r for r, names in waiting.items() if not names & waiting.keys()}:
        for r in free:
            del waiting[r]
    assert not waiting, "in a circle, or above one"


def test_few_modules_lie_at_the_root() -> None:
    assert len(list(ROOT.glob("*.py"))) <= 9


@pytest.mark.parametrize("module", [m for m in EVERY if room(m) in ("runtime", "bundle")])
def test_the_runtime_imports_little(module: str) -> None:
    assert {room(name) for name in neighbours(module, types=False, functions=False)} <= RUNTIME_NEEDS
    foreign = {n.split(".")[0] for n in imports(modules()[module])} - set(sys.stdlib_module_names) - {"toolchain"}
    assert foreign <= {"numpy", "tokenizers", "PIL"} | ({"cryptography"} if module == "bundle.signing" else set())


@pytest.mark.parametrize("module", EVERY)
def test_libraries_stay_with_their_owners(module: str) -> None:
    for name in {n.split(".")[0] for n in imports(modules()[module])} & OWNERS.keys():
        assert room(module) in OWNERS[name], f"{module} imports {name}"


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)]


def length(function: ast.FunctionDef) -> int:
    return (function.end_lineno or 0) - function.lineno + 1


@pytest.mark.parametrize("module", EVERY)
def test_modules_and_functions_stay_short(module: str) -> None:
    path = modules()[module]
    assert len(path.read_text().splitlines()) <= 400
    for function in functions(path):
        assert length(function) <= 60, f"{function.name} is too long"


def test_nine_functions_in_ten_have_at_most_twenty_lines() -> None:
    lengths = sorted(length(function) for path in modules().values() for function in functions(path))
    assert lengths[len(lengths) * 9 // 10] <= 20


def public_functions(tree: ast.Module) -> Iterator[ast.FunctionDef]:
    """Functions of a module and methods of its public classes, without nested ones."""
    for node in tree.body:
        members = node.body if isinstance(node, ast.ClassDef) and not node.name.startswith("_") else [node]
        yield from (m for m in members if isinstance(m, ast.FunctionDef) and not m.name.startswith("_"))


def test_public_functions_have_docstrings() -> None:
    public = [(m, f) for m, path in modules().items() for f in public_functions(ast.parse(path.read_text()))]
    without = [f"{module}.{function.name}" for module, function in public if not ast.get_docstring(function)]
    assert len(without) <= 0.02 * len(public), without


@pytest.mark.parametrize(
    "module", ["toolchain", "toolchain.builder.plan", "toolchain.builder.assemble", "toolchain.runtime.pipeline"]
)
def test_heavy_libraries_are_imported_late(module: str) -> None:
    """Planning and running must not pay seconds for torch, nor a replica have it at all."""
    code = (
        f"import sys, {module}; print(sorted({{'torch', 'diffusers', 'transformers', 'onnx_ir'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
