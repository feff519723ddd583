"""The folder list is the sentence: who may import whom, and what may not be imported at run time."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "toolchain"
# Each row may import from the rows above it and from itself.
LAYERS = (
    ("errors", "garbage", "terminal", "wrapping"),
    ("recipe", "settings", "signature", "store", "graph", "sampler"),
    ("weights",),
    ("cuda", "models", "bundle"),
    ("export", "engines"),
    ("builder", "runtime"),
    ("check",),
    ("bench", "trace"),
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
    "diffusers": {"models", "sampler", "check", "bench"},
    "transformers": {"models", "check"},
    "onnxscript": {"graph"},
    "huggingface_hub": {"models"},
    "openvino": {"bench"},
    "click": {"cli", "terminal"},
    "cryptography": {"bundle"},
    "rich": {"cli"},
}


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imports(path: Path, *, top_level: bool = False) -> set[str]:
    """Dotted names that a file imports; `top_level` leaves out functions and `if TYPE_CHECKING`."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return found


def ours(path: Path, *, top_level: bool = False) -> set[str]:
    names = {name.split(".")[1] for name in imports(path, top_level=top_level) if name.startswith("toolchain.")}
    return names - {part(path)}


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_upwards(path: Path) -> None:
    if path.name == "__init__.py" and path.parent == ROOT:
        return
    rank = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    assert part(path) in rank, f"{part(path)} has no place in LAYERS"
    for name in ours(path, top_level=True):
        assert rank[name] <= rank[part(path)], f"{path.name} imports {name}, which is below it"


@pytest.mark.parametrize("path", [p for p in modules() if part(p) in ("runtime", "bundle")], ids=lambda p: p.name)
def test_the_runtime_imports_little(path: Path) -> None:
    assert ours(path, top_level=True) <= RUNTIME_NEEDS
    foreign = {n.split(".")[0] for n in imports(path)} - set(sys.stdlib_module_names) - {"toolchain"}
    assert foreign <= {"numpy", "tokenizers", "PIL"} | ({"cryptography"} if path.name == "signing.py" else set())


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_with_their_owners(path: Path) -> None:
    for name in {n.split(".")[0] for n in imports(path)} & OWNERS.keys():
        assert part(path) in OWNERS[name], f"{path.name} imports {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(ROOT)))
def test_modules_and_functions_stay_short(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 420
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} is too long"


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
