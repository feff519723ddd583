"""Checks a source file's use of TensorRT against the surfaces of several versions, without running it.

What a value is follows from where it comes from: the module, constructors, the return types that the bindings document,
functions of the same file. What comes from elsewhere is known by its name, see `CONVENTION`; an attribute that only
TensorRT's objects have, on a value of unknown type, is a problem too, so that no use goes unseen.

A name that a version lacks is allowed in a function that asks with hasattr() or getattr() for a name which that version
lacks as well.
"""

from __future__ import annotations

import ast
import difflib
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.trt.bindings import Signature, Surface

MODULE = "<module>"
CONVENTION = {
    "trt": MODULE,
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "runtime": "Runtime",
    "engine": "ICudaEngine",
    "context": "IExecutionContext",
    "refitter": "Refitter",
    "inspector": "EngineInspector",
    "profile": "IOptimizationProfile",
    "layer": "ILayer",
}
Type = str | None
"""A class's name for its instances, "class X", "list X", MODULE, "other" for what is not TensorRT's, None: unknown."""


def uses_tensorrt(path: Path) -> bool:
    return "tensorrt" in path.name or any(
        (isinstance(n, ast.Import) and any(a.name == "tensorrt" for a in n.names))
        or (isinstance(n, ast.ImportFrom) and n.module == "tensorrt")
        or (isinstance(n, ast.arg) and n.arg == "trt")
        or (isinstance(n, ast.Name) and n.id == "trt")
        for n in ast.walk(ast.parse(path.read_text()))
    )


def problems(source: str, surfaces: Sequence[Surface], where: str = "source") -> list[str]:
    """Every use of TensorRT in `source` that one of the versions does not have, with its line."""
    tree = ast.parse(source)
    returns = _return_types(tree, surfaces[-1])
    found: dict[str, list[str]] = {}
    for surface in surfaces:
        for line, text in _File(surface, returns, _names_of(surfaces)).check(tree):
            found.setdefault(f"{where}:{line}: {text}", []).append(surface.version)
    return [f"{text} ({', '.join(versions)})" for text, versions in found.items()]


def _names_of(surfaces: Sequence[Surface]) -> frozenset[str]:
    """Attributes that betray TensorRT's objects: two words or more, such as set_tensor_address."""
    names = {name for surface in surfaces for name in surface.names}
    return frozenset(n for n in names if "_" in n and n.islower() and len(n) > 8)


@functools.cache
def _nearest(name: str, names: frozenset[str]) -> str | None:
    return next(iter(difflib.get_close_matches(name, names, n=1, cutoff=0.9)), None)


def _return_types(tree: ast.Module, surface: Surface) -> dict[str, Type]:
    """What the file's own functions return, as far as it shows."""
    returns: dict[str, Type] = {}
    for _ in range(3):  # functions that return what others return
        file = _File(surface, dict(returns), frozenset())
        list(file.check(tree))
        returns |= file.returned
    return returns


@dataclass
class _Scope:
    """What is known inside a function: the types of its variables, and which names it asks for before it uses them."""

    types: dict[str, Type] = field(default_factory=dict)
    guards: set[str] = field(default_factory=set)
    own: dict[str, Type] = field(default_factory=dict)  # of self, shared by the methods of a class
    dynamic: dict[str, list[str]] = field(default_factory=dict)  # variables that go through literal strings
    function: str = ""


class _File:
    def __init__(self, surface: Surface, returns: dict[str, Type], betraying: frozenset[str]) -> None:
        self.surface, self.returns, self.betraying = surface, returns, betraying
        self.returned: dict[str, Type] = {}
        self._problems: list[tuple[int, str]] = []
        self._scope = _Scope()

    def check(self, tree: ast.Module) -> Iterator[tuple[int, str]]:
        self._body(tree.body)
        yield from dict.fromkeys(self._problems)

    # Statements

    def _body(self, statements: Sequence[ast.stmt]) -> None:
        for statement in statements:
            self._statement(statement)

    def _statement(self, node: ast.stmt) -> None:
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name == "tensorrt":
                    self._scope.types[alias.asname or "tensorrt"] = MODULE
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                kind = self._of_module(node, alias.name) if node.module == "tensorrt" else None
                # What tests make for each other is not TensorRT's, whatever it is called.
                self._scope.types[alias.asname or alias.name] = "other" if "tests" in (node.module or "") else kind
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            self._function(node)
        elif isinstance(node, ast.ClassDef):
            self._class(node)
        elif isinstance(node, ast.Assign):
            kind = self._type(node.value)
            for target in node.targets:
                self._assign(target, kind, node.value)
        elif isinstance(node, ast.AnnAssign):
            kind = self._annotated(node.annotation) or (self._type(node.value) if node.value else None)
            self._assign(node.target, kind, node.value)
        elif isinstance(node, ast.For):
            self._loop(node.target, node.iter)
            self._body([*node.body, *node.orelse])
        elif isinstance(node, ast.Return) and node.value is not None:
            kind = self._type(node.value)
            self.returned[self._scope.function] = self.returned.get(self._scope.function) or kind
        else:
            self._children(node)

    def _children(self, node: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt):
                self._statement(child)
            elif isinstance(child, ast.withitem):
                kind = self._type(child.context_expr)
                if child.optional_vars is not None:
                    self._assign(child.optional_vars, kind, child.context_expr)
            elif isinstance(child, ast.expr):
                self._type(child)
            else:
                self._children(child)

    def _function(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        outer = self._scope
        self._scope = _Scope(dict(outer.types), outer.guards | _guards(node), outer.own, function=node.name)
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            opaque = argument.annotation is None or ast.unparse(argument.annotation) in ("Any", "object")
            known = self._annotated(argument.annotation)
            self._scope.types[argument.arg] = known or (_conventional(argument.arg) if opaque else "other")
        self._body(node.body)
        self._scope = outer

    def _class(self, node: ast.ClassDef) -> None:
        for base in node.bases:
            kind = self._type(base)
            if kind is not None and kind.startswith("class "):
                self._overrides(node, kind.removeprefix("class "))
        outer = self._scope
        self._scope = _Scope(dict(outer.types), outer.guards)
        for _ in range(2):  # what a method puts into self is known to the methods above it, too
            self._body(node.body)
        self._scope = outer

    def _overrides(self, node: ast.ClassDef, cls: str) -> None:
        """A class of ours that TensorRT calls must have every method that it calls, with as many arguments."""
        ours = {n.name: n for n in node.body if isinstance(n, ast.FunctionDef)}
        for name, entry in self.surface.attributes(cls).items():
            if entry["kind"] != "method" or name == "__init__":
                continue
            if name not in ours:
                self._report(node, f"{node.name} does not override {cls}.{name}")
            elif len(ours[name].args.args) - 1 != len(self.surface.method(cls, name)[0].arguments):
                self._report(ours[name], f"{node.name}.{name} takes other arguments than {cls}.{name}")

    def _assign(self, target: ast.expr, kind: Type, value: ast.expr | None) -> None:
        if isinstance(target, ast.Name):
            self._scope.types[target.id] = kind or (None if value is None else _conventional(target.id))
        elif isinstance(target, ast.Tuple | ast.List):
            parts = value.elts if isinstance(value, ast.Tuple | ast.List) else [None] * len(target.elts)
            if len(parts) == len(target.elts):
                for one, part in zip(target.elts, parts, strict=True):
                    self._assign(one, None if part is None else self._type(part), part)
        elif isinstance(target, ast.Attribute):
            owner = self._type(target.value)
            if isinstance(target.value, ast.Name) and target.value.id == "self":
                self._scope.own[target.attr] = kind or self._scope.own.get(target.attr) or _conventional(target.attr)
            elif target.attr == "__class__" and isinstance(target.value, ast.Name) and kind:
                self._scope.types[target.value.id] = kind.removeprefix("class ")
            else:
                self._attribute(target, owner, target.attr, assigned=True)
        else:
            self._children(target)

    def _loop(self, target: ast.expr, iterable: ast.expr) -> None:
        kind = self._type(iterable)
        element = kind.removeprefix("list ") if kind and kind.startswith("list ") else None
        self._assign(target, element, None)
        rows = iterable.elts if isinstance(iterable, ast.Tuple | ast.List) else []
        names = target.elts if isinstance(target, ast.Tuple) else [target]
        for at, name in enumerate(names):
            cells = [row.elts[at] if isinstance(row, ast.Tuple) and len(row.elts) > at else row for row in rows]
            if isinstance(name, ast.Name):
                texts = [c.value for c in cells if isinstance(c, ast.Constant) and isinstance(c.value, str)]
                self._scope.dynamic[name.id] = texts

    # Expressions

    def _type(self, node: ast.expr) -> Type:
        """The type of an expression; on the way everything in it is checked."""
        if isinstance(node, ast.Name):
            return self._scope.types.get(node.id, _conventional(node.id))
        if isinstance(node, ast.Attribute):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                return self._scope.own.get(node.attr, _conventional(node.attr))
            return self._attribute(node, self._type(node.value), node.attr)
        if isinstance(node, ast.Call):
            return self._call(node)
        if isinstance(node, ast.IfExp):
            self._type(node.test)
            kinds = [self._type(node.body), self._type(node.orelse)]
            return next((k for k in kinds if k), None)
        if isinstance(node, ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp):
            return self._comprehension(node)
        if isinstance(node, ast.Subscript):
            self._type(node.slice)
            kind = self._type(node.value)
            return kind.removeprefix("list ") if kind and kind.startswith("list ") else None
        self._children(node)
        return None

    def _comprehension(self, node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp) -> Type:
        outer = self._scope
        self._scope = _Scope(dict(outer.types), outer.guards, outer.own, dict(outer.dynamic), outer.function)
        for generator in node.generators:
            self._loop(generator.target, generator.iter)
            for condition in generator.ifs:
                self._type(condition)
        kinds = [self._type(e) for e in ([node.key, node.value] if isinstance(node, ast.DictComp) else [node.elt])]
        self._scope = outer
        return f"list {kinds[0]}" if kinds[0] and len(kinds) == 1 else None

    def _attribute(self, node: ast.AST, owner: Type, name: str, assigned: bool = False) -> Type:
        if owner == MODULE:
            return self._of_module(node, name)
        if owner is None or owner == "other" or owner.startswith("list "):
            if owner is None:
                self._unseen(node, name)
            return None
        cls = owner.removeprefix("class ")
        if cls not in self.surface.classes or name in ("__class__", "__name__"):
            return None
        entry = self.surface.attributes(cls).get(name)
        if entry is None:
            if self.surface.members(cls) is not None and name in ("name", "value"):
                return None
            self._missing(node, name, f"{cls} has no {name}")
            return None
        if assigned and not entry.get("settable"):
            self._report(node, f"{cls}.{name} cannot be set")
        if entry["kind"] == "property":
            return self._known(self.surface.property_type(cls, name))
        if entry["kind"] == "class":
            return f"class {entry['type']}"
        return cls if entry["kind"] == "member" else entry.get("type")

    def _of_module(self, node: ast.AST, name: str) -> Type:
        if not self.surface.has(name):
            self._missing(node, name, f"tensorrt has no {name}")
            return None
        if self.surface.is_value(name):
            return self._known(self.surface.type_of_value(name))
        return None if self.surface.is_function(name) else f"class {name}"

    def _call(self, node: ast.Call) -> Type:
        arguments = [self._type(a.value if isinstance(a, ast.Starred) else a) for a in node.args]
        for keyword in node.keywords:
            self._type(keyword.value)
        function = node.func
        if isinstance(function, ast.Name):
            if function.id in ("hasattr", "getattr", "setattr") and len(node.args) > 1:
                return self._by_name(node, arguments[0])
            if function.id in ("list", "tuple", "sorted", "reversed") and arguments:
                return arguments[0]
            kind = self._scope.types.get(function.id) or self.returns.get(function.id)
            return self._made(node, kind) if kind and kind.startswith("class ") else kind
        if isinstance(function, ast.Attribute):
            owner = self._type(function.value)
            if isinstance(function.value, ast.Name) and function.value.id == "self":
                return self.returns.get(function.attr)
            if owner == MODULE and self.surface.has(function.attr) and self.surface.is_function(function.attr):
                return self._fits(node, self.surface.function(function.attr), function.attr)
            kind = self._attribute(function, owner, function.attr)
            if kind is not None and kind.startswith("class "):
                return self._made(node, kind)
            cls = (owner or "").removeprefix("class ")
            if cls in self.surface.classes and function.attr in self.surface.attributes(cls):
                skip = int((owner or "").startswith("class "))  # trt.ILogger.__init__(self)
                return self._fits(node, self.surface.method(cls, function.attr), f"{cls}.{function.attr}", skip)
            return None
        self._type(function)
        return None

    def _made(self, node: ast.Call, kind: str) -> Type:
        cls = kind.removeprefix("class ")
        if self.surface.members(cls) is None:
            self._fits(node, self.surface.method(cls, "__init__"), cls)
        return cls

    def _by_name(self, node: ast.Call, owner: Type) -> Type:
        """Of the names that show, setattr()'s and plain getattr()'s must be there; the others are guards."""
        assert isinstance(node.func, ast.Name)
        key = node.args[1]
        names = self._scope.dynamic.get(key.id, []) if isinstance(key, ast.Name) else []
        if isinstance(key, ast.Constant):
            names = [str(key.value)]
        for name in names if owner is not None else []:
            if node.func.id == "setattr" or (node.func.id == "getattr" and len(node.args) == 2):
                self._attribute(node, owner, name, assigned=node.func.id == "setattr")
        return None

    def _fits(self, node: ast.Call, signatures: list[Signature], what: str, skip: int = 0) -> Type:
        if not signatures:
            return None
        splat = any(isinstance(a, ast.Starred) for a in node.args) or any(k.arg is None for k in node.keywords)
        given = len(node.args) - skip
        keywords = [k.arg for k in node.keywords if k.arg is not None]
        for signature in signatures:
            names = [a.name for a in signature.arguments]
            required = {a.name for a in signature.arguments if a.required}
            taken = set(names[:given]) | set(keywords)
            unknown = [k for k in keywords if k not in names[given:]]
            if not unknown and (splat or (given <= len(names) and required <= taken)):
                return self._known(signature.returns)
        wanted = " or ".join(f"({', '.join(a.name for a in s.arguments)})" for s in signatures)
        self._report(node, f"{what} takes {wanted}, not {given} arguments and {keywords}")
        return self._known(signatures[0].returns)

    def _annotated(self, annotation: ast.expr | None) -> Type:
        """trt.ICudaEngine, also in quotes or with | None."""
        if isinstance(annotation, ast.Constant) and isinstance(annotation.value, str):
            annotation = ast.parse(annotation.value, mode="eval").body
        if isinstance(annotation, ast.BinOp):
            return self._annotated(annotation.left) or self._annotated(annotation.right)
        if isinstance(annotation, ast.Attribute):
            kind = self._type(annotation)
            return kind.removeprefix("class ") if kind and kind.startswith("class ") else None
        return None

    def _known(self, kind: str) -> Type:
        inner = kind.removeprefix("list[").removesuffix("]")
        if kind.startswith("list[") and inner in self.surface.classes:
            return f"list {inner}"
        return kind if kind in self.surface.classes else None

    # Findings

    def _unseen(self, node: ast.AST, name: str) -> None:
        close = _nearest(name, self.betraying)
        if close:
            self._report(node, f".{name} looks like TensorRT's {close}, of an object that no rule knows")

    def _missing(self, node: ast.AST, name: str, text: str) -> None:
        if self._scope.guards <= self.surface.names:
            self._report(node, text)

    def _report(self, node: ast.AST, text: str) -> None:
        self._problems.append((getattr(node, "lineno", 0), text))


def _conventional(name: str) -> Type:
    return CONVENTION.get(name.lstrip("_"))


def _guards(function: ast.AST) -> set[str]:
    """The names that a function asks for with hasattr(x, "name") or getattr(x, "name", default)."""
    return {
        str(node.args[1].value)
        for node in ast.walk(function)
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and (node.func.id == "hasattr" or (node.func.id == "getattr" and len(node.args) == 3))
        and isinstance(node.args[1], ast.Constant)
    }


def guards(source: str) -> set[str]:
    """Every name that a file asks for before it uses it: one that no version has would silently never be used."""
    return _guards(ast.parse(source))
