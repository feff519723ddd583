"""The surface of NVIDIA's TensorRT bindings as data: classes, members, methods with the names of their arguments.

The wheels `tensorrt_cu13_bindings` hold the bindings without the libraries. With libraries that export nothing but the
nine entry points they can be imported, looked at, and not used. A surface is made once and kept in pytest's cache.
TensorRT for RTX is looked at where it is installed.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VERSIONS = ("10.13.3.9", "10.16.1.11", "11.4.0.106")
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
ENTRY_POINTS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "getBuilderPluginRegistry",
    "getPluginRegistry",
    "getNvOnnxParserVersion",
    "initLibNvInferPlugins",
)
CPP_NAMES = {"IParserError": "ParserError"}  # what docstrings call by the name of the C++ class
FORMAT = 5  # of the kept surfaces

DUMP = """
import json, sys
IMPORT
def text(value):
    return getattr(value, "__doc__", None) or ""
def describe(value):
    if isinstance(value, property):
        return {"kind": "property", "doc": text(value.fget), "settable": value.fset is not None}
    if isinstance(value, type):
        return {"kind": "class", "type": value.__name__}
    if callable(value):
        return {"kind": "method", "doc": text(value)}
    return {"kind": "value", "type": type(value).__name__}
classes, functions, values = {}, {}, {}
names = {name: getattr(module, name) for name in dir(module)}
for value in [v for v in names.values() if isinstance(v, type)]:
    names |= {inner.__name__: inner for inner in vars(value).values() if isinstance(inner, type)}  # ILogger.Severity
for name, value in names.items():
    if isinstance(value, type):
        members = getattr(value, "__members__", None)
        classes[name] = {
            "bases": [base.__name__ for base in value.__mro__[1:]],
            "members": None if members is None else {k: int(v) for k, v in members.items()},
            "attributes": {k: describe(v) for k, v in vars(value).items() if k == "__init__" or k[0] != "_"},
        }
    elif callable(value):
        functions[name] = text(value)
    else:
        values[name] = type(value).__name__
json.dump(
    {"version": module.__version__, "classes": classes, "functions": functions, "values": values}, sys.stdout
)
"""


INSTALLED_RTX = "from toolchain.engines.tensorrt.library import TENSORRT_RTX; module = TENSORRT_RTX.module()"


class UnavailableError(Exception):
    """The bindings cannot be had here; the text says why."""


@dataclass(frozen=True)
class Argument:
    name: str
    type: str
    required: bool


@dataclass(frozen=True)
class Signature:
    """One overload of a function, without self; `returns` is a class's name, or what the binding says."""

    arguments: tuple[Argument, ...]
    returns: str


class Surface:
    """What one version of the module offers. `names` are all classes, members and attributes."""

    def __init__(self, version: str, data: dict[str, Any]) -> None:
        self.version = version
        self._classes: dict[str, Any] = data["classes"]
        self._functions: dict[str, str] = data["functions"]
        self._values: dict[str, str] = data["values"]
        self._attributes: dict[str, dict[str, dict[str, Any]]] = {}
        self.names = {name for cls in self._classes for name in self.attributes(cls)} | set(self._classes)

    @property
    def classes(self) -> list[str]:
        return list(self._classes)

    def attributes(self, cls: str) -> dict[str, dict[str, Any]]:
        """Of a class and its bases."""
        if cls not in self._attributes:
            found: dict[str, dict[str, Any]] = {}
            for name in reversed([cls, *self._classes[cls]["bases"]]):
                if name in self._classes:
                    found |= self._classes[name]["attributes"]
                    found |= {m: {"kind": "member"} for m in self._classes[name]["members"] or {}}
            self._attributes[cls] = found
        return self._attributes[cls]

    def members(self, cls: str) -> dict[str, int] | None:
        found: dict[str, int] | None = self._classes[cls]["members"]
        return found

    def has(self, name: str) -> bool:
        return name in self._classes or name in self._functions or name in self._values

    def is_value(self, name: str) -> bool:
        return name in self._values

    def type_of_value(self, name: str) -> str:
        return self._values[name]

    def is_function(self, name: str) -> bool:
        return name in self._functions

    def function(self, name: str) -> list[Signature]:
        return signatures(self._functions[name])

    def method(self, cls: str, name: str) -> list[Signature]:
        return signatures(self.attributes(cls)[name].get("doc", ""))

    def property_type(self, cls: str, name: str) -> str:
        found = signatures(self.attributes(cls)[name].get("doc", ""))
        return found[0].returns if found else ""


@functools.cache
def signatures(doc: str) -> list[Signature]:
    """What pybind11 wrote at the top of a docstring, or the numbered overloads in it."""
    found = []
    for line in doc.splitlines():
        match = re.match(r"(?:\d+\. )?\w*\((.*)\) -> (.+)$", line.strip())
        if match and not match[1].startswith("*args"):
            arguments = [_argument(part) for part in _split(match[1]) if part]
            if arguments and arguments[0].name == "self":
                del arguments[0]
            found.append(Signature(tuple(arguments), _short(match[2])))
    return found


def _split(text: str) -> list[str]:
    """At commas outside of brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += letter in "([{<"
        depth -= letter in ")]}>"
        if letter == "," and depth == 0:
            parts.append(text[start:at].strip())
            start = at + 1
    return [*parts, text[start:].strip()]


def _argument(text: str) -> Argument:
    name, _, rest = text.partition(":")
    kind, equals, _ = rest.partition(" = ")
    return Argument(name.strip(), _short(kind.strip()), not equals)


def _short(kind: str) -> str:
    """A class's own name: without modules, in Python's or C++'s notation."""
    plain = re.sub(r"\b(?:\w+(?:\.|::))+(\w+)", r"\1", kind).strip()
    return CPP_NAMES.get(plain, plain)


def load(version: str, cache: Path) -> Surface:
    """The surface of a version; installs its bindings first where `cache` does not hold it. UnavailableError."""
    kept = cache / f"surface-{version}-py{sys.version_info.minor}-{FORMAT}.json"
    if not kept.is_file():
        text = _dump(version)
        part = kept.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(kept)
    return Surface(version, json.loads(kept.read_text()))


def load_rtx() -> Surface:
    """Of TensorRT for RTX as it is installed. UnavailableError."""
    data = json.loads(dump(INSTALLED_RTX, os.pathsep.join(sys.path)))
    return Surface(f"RTX {data['version']}", data)


def dump(imports: str, path: str) -> str:
    """The surface of what a statement imports as `module`, as JSON, read in a process of its own on a search path."""
    code = DUMP.replace("IMPORT", imports)
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
        check=False,
    )
    if done.returncode:
        raise UnavailableError(f"{imports!r} fails: {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


def _dump(version: str) -> str:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise UnavailableError("no C compiler, for libraries that NVIDIA's bindings can be linked to")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "site"
        requirement = f"tensorrt_cu13_bindings=={version}"
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), requirement]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UnavailableError(f"pip cannot install {requirement}: {done.stderr.strip().splitlines()[-1]}")
        _stub_libraries(compiler, Path(folder), target / "tensorrt_bindings", version.split(".")[0])
        return dump("import tensorrt_bindings as module", str(target))


def _stub_libraries(compiler: str, folder: Path, place: Path, major: str) -> None:
    source = folder / "stub.c"
    source.write_text("\n".join(f"void *{name}(void) {{ return 0; }}" for name in ENTRY_POINTS))
    for library in LIBRARIES:
        name = f"lib{library}.so.{major}"
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(place / name), str(source)]
        subprocess.run(command, check=True)
