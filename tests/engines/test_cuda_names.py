"""The names that source and fake use are NVIDIA's: compared with the real cuda-bindings, which need no driver."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import json
import os
import re
import subprocess
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest

from tests.pretend import FAKES, pretended

ENGINES = Path(__file__).parents[2] / "toolchain" / "cuda"
OLDEST = "13.0.0"
OWNERS = {"cuda": "runtime", "cu": "driver", "nvrtc": "nvrtc"}
"""Prefix of a name -> its module below cuda.bindings."""
PROBE = """
import importlib, json, re, sys
asked = json.load(sys.stdin)
told = {}
for module, names in asked.items():
    real = importlib.import_module("cuda.bindings." + module)
    told[module] = found = {}
    for name, members in names.items():
        thing = getattr(real, name, None)
        if thing is None:
            found[name] = None
        elif members:
            found[name] = {m: int(getattr(thing, m)) if hasattr(thing, m) else None for m in members}
        elif isinstance(thing, int):
            found[name] = int(thing)
        else:  # a function's signature is the first line of its text: "name(a, size_t b, c: type)"
            given = re.match(r"[^(]*\\((.*?)\\)\\n", thing.__doc__ or "()")
            plain = re.sub(r"\\[.*?\\]", "", given[1]) if given else ""
            parts = [p.split(":")[0].split()[-1].lstrip("*") for p in plain.split(",") if p.strip()]
            found[name] = parts
print(json.dumps(told))
"""


def calls_in(source: Path) -> set[str]:
    """Every CUDA name in a file: in strings, as those of `call`, and as attributes."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            found.add(node.value)
    return {name for name in found if name_prefix(name)}


def name_prefix(name: str) -> str:
    """ "cuda", "cu" or "nvrtc", when it is the prefix of a name in CamelCase; "" otherwise."""
    found = re.fullmatch(r"(cuda|cu|nvrtc)[A-Z]\w*", name)
    return found[1] if found else ""


def fakes() -> dict[str, dict[str, Any]]:
    with pretended():
        return {module: faked(importlib.import_module(f"cuda.bindings.{module}")) for module in OWNERS.values()}


def faked(module: Any) -> dict[str, Any]:
    """Public name -> an enum's members, a function's parameters, or a constant."""
    found: dict[str, Any] = {}
    for name, thing in vars(module).items():
        if not name_prefix(name):
            continue
        if inspect.isclass(thing):
            found[name] = {m.name: m.value for m in thing} if issubclass(thing, IntEnum) else None
        else:
            found[name] = list(inspect.signature(thing).parameters) if callable(thing) else thing
    return found


@pytest.fixture(scope="module", params=["newest", OLDEST])
def probe(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Asks the real package, in a process that knows nothing of the fake."""
    there = [p for p in sys.path if Path(p) != FAKES]
    installed = importlib.util.find_spec("cuda.bindings") if importlib.util.find_spec("cuda") else None
    if request.param == OLDEST or installed is None:
        place = tmp_path_factory.mktemp("bindings")
        wanted = f"cuda-bindings=={OLDEST}" if request.param == OLDEST else "cuda-bindings>=13"
        command = [sys.executable, "-m", "pip", "install", "-q", "--target", str(place), wanted]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"{wanted} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
        there.insert(0, str(place))

    def ask(names: dict[str, dict[str, Any]]) -> Any:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(there)}
        command = [sys.executable, "-c", PROBE]
        done = subprocess.run(
            command, input=json.dumps(names), capture_output=True, text=True, check=True, env=environment
        )
        return json.loads(done.stdout)

    return ask


def test_the_source_calls_what_exists(probe: Any) -> None:
    used = set().union(*(calls_in(path) for path in ENGINES.glob("*.py")))
    assert {"cudaGraphLaunch", "cudaMemcpyHostToDevice", "cuLaunchKernel", "nvrtcGetCUBIN"} <= used
    asked: dict[str, dict[str, Any]] = {}
    for module, fake in fakes().items():
        enums = {member: name for name, thing in fake.items() if isinstance(thing, dict) for member in thing}
        ours = {name for name in used if OWNERS[name_prefix(name)] == module}
        unknown = ours - fake.keys() - enums.keys()
        assert not unknown, "the fake lacks them, so nothing tests them"
        members = {enums[name]: fake[enums[name]] for name in ours & enums.keys()}
        asked[module] = dict.fromkeys(ours - enums.keys()) | members
    found = probe(asked)
    assert [name for names in found.values() for name, thing in names.items() if thing is None] == []


def test_the_fake_is_like_the_real_one(probe: Any) -> None:
    fake = fakes()
    asked = {
        module: {name: thing if isinstance(thing, dict) else None for name, thing in names.items()}
        for module, names in fake.items()
    }
    real = probe(asked)
    for module, names in fake.items():
        for name, thing in names.items():
            assert real[module][name] is not None, name
            if thing is not None:
                assert real[module][name] == thing, name
