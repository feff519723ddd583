"""Plain data -> frozen dataclasses, strictly: annotations say what a value may be.

Nothing is coerced except an integer where a number is wanted, and every problem is reported at once with its path.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from toolchain.errors import RecipeError
from toolchain.recipe.bucket import BUCKET_FORM, BUCKET_SETS, Bucket, bucket_problem
from toolchain.recipe.options import Prompt, Text
from toolchain.recipe.prompts import PROMPT_SETS

NAMED: dict[Any, tuple[str, Mapping[str, tuple[Any, ...]]]] = {
    Bucket: ("buckets", {name: tuple(map(Bucket.parse, texts)) for name, texts in BUCKET_SETS.items()}),
    Prompt: ("prompts", PROMPT_SETS),
}
"""Entries whose lists may have a name -> what they are, and the lists."""


def structure(kind: Any, data: dict[str, Any], name: Any, *, where: str) -> Any:
    """A recipe of dataclass `kind` from plain data. RecipeError with every problem."""
    problems: list[str] = []
    given = {"name": _read(Text, name, "name", problems)}  # not a key of the table: the file's name is the recipe's
    recipe = _read_table(kind, data, "", problems, given=given)
    if problems:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise RecipeError("\n  ".join([f"{count} in the recipe:", *problems]), where=where)
    return recipe


def _read(kind: Any, value: Any, path: str, problems: list[str]) -> Any:
    """`value` as `kind`. A problem is appended to `problems` as one line, and the result is then of no use."""
    if get_origin(kind) is Annotated:
        inner, rule = get_args(kind)
        before = len(problems)
        result = _read(inner, value, path, problems)
        if get_origin(inner) is not tuple and len(problems) > before:
            problems[before:] = [_line(path, "wrong type", rule.expected, value)]
        elif len(problems) == before and not rule.holds(result):
            empty = not result.strip() if isinstance(result, str) else isinstance(result, tuple)
            problems.append(_line(path, "empty" if empty else "out of range", rule.expected, value))
        return result
    if is_dataclass(kind) and kind is not Bucket:
        return _read_table(kind, value, path, problems, given={})
    if get_origin(kind) is tuple:
        if type(value) is str and get_args(kind)[0] in NAMED:
            return _read_named(get_args(kind)[0], value, path, problems)
        return _read_list(get_args(kind)[0], value, path, problems)
    if get_origin(kind) is Mapping:
        if type(value) is dict:
            return {key: _read(get_args(kind)[1], v, _join(path, key), problems) for key, v in value.items()}
    elif get_origin(kind) is Literal:
        if value in get_args(kind):
            return value
        if type(value) is str:
            problems.append(_line(path, f"unknown value{nearest(value, get_args(kind))}", _describe(kind), value))
            return None
    elif isinstance(kind, UnionType):
        if type(value) in get_args(kind):
            return value
        if is_dataclass(get_args(kind)[0]):  # a table that may be absent
            return _read_table(get_args(kind)[0], value, path, problems, given={})
    elif kind is Bucket:
        if type(value) is str:
            problem = bucket_problem(value)
            return problems.append(_line(path, problem, BUCKET_FORM, value)) if problem else Bucket.parse(value)
    elif kind is float and type(value) is int:
        return float(value) if abs(value) < 2**1000 else math.inf
    elif type(value) is kind:
        return value
    problems.append(_line(path, "wrong type", _describe(kind), value))
    return None


def _read_table(kind: Any, value: Any, path: str, problems: list[str], *, given: Mapping[str, Any]) -> Any:
    """A dataclass from a table; the fields in `given` are set already and are no keys of the table."""
    if type(value) is not dict:
        problems.append(_line(path, "wrong type", "a table", value))
        return None
    known = {key: entry for key, entry in _schema(kind).items() if key not in given}
    values = dict(given)
    before = len(problems)
    for key in value:
        if key not in known:
            problems.append(_unknown(kind, _join(path, key), key, known))
    for key, (annotation, required) in known.items():
        if key in value:
            values[key] = _read(annotation, value[key], _join(path, key), problems)
        elif required and is_dataclass(annotation):
            # Go in with nothing, so that the keys that must be written are named rather than the table.
            values[key] = _read_table(annotation, {}, _join(path, key), problems, given={})
        elif required:
            problems.append(f"{_join(path, key)}: missing key (expected {_describe(annotation)}, got nothing)")
    return kind(**values) if len(problems) == before else None


def _unknown(kind: Any, path: str, key: str, known: Any) -> str:
    reason = getattr(kind, "REFUSED", {}).get(key)
    if reason:
        return f"{path}: cannot be had: {reason}"
    return _line(path, f"unknown key{nearest(key, known)}", f"one of {', '.join(known)}", key)


def _read_list(kind: Any, value: Any, path: str, problems: list[str]) -> tuple[Any, ...]:
    """Lists are sets in order: an entry that is given twice is a slip of the pen."""
    if type(value) is not list:
        problems.append(_line(path, "wrong type", f"a list, each {_describe(kind)}", value))
        return ()
    results: list[Any] = []
    for i, entry in enumerate(value):
        before = len(problems)
        result = _read(kind, entry, f"{path}[{i}]", problems)
        if len(problems) == before and result in results:
            problems.append(_line(f"{path}[{i}]", "duplicate", "each entry once", entry))
        results.append(result)
    return tuple(results)


def _read_named(kind: Any, name: str, path: str, problems: list[str]) -> tuple[Any, ...]:
    what, lists = NAMED[kind]
    if name not in lists:
        expected = f"a list of {what}, or one of " + ", ".join(lists)
        problems.append(_line(path, f"unknown name{nearest(name, lists)}", expected, name))
    return lists.get(name, ())


@cache
def _schema(kind: Any) -> dict[str, tuple[Any, bool]]:
    """Key -> (annotation, required) of a dataclass."""

    def required(item: Field[Any]) -> bool:
        return item.default is MISSING and item.default_factory is MISSING

    hints = get_type_hints(kind, include_extras=True)
    return {item.name: (hints[item.name], required(item)) for item in fields(kind)}


def _describe(kind: Any) -> str:
    if get_origin(kind) is Annotated:
        return str(get_args(kind)[1].expected)
    if isinstance(kind, UnionType):
        return " or ".join(map(_describe, get_args(kind)))
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is Mapping or (is_dataclass(kind) and kind is not Bucket):
        return "a table"
    return {Bucket: BUCKET_FORM, str: "a string", int: "an integer", float: "a number", bool: "true or false"}[kind]


def _line(path: str, problem: str, expected: str, got: Any) -> str:
    return f"{path or 'recipe'}: {problem} (expected {expected}, got {_show(got)})"


def _show(value: Any) -> str:
    """A value as TOML's reader wrote it, short enough for a line."""
    if isinstance(value, dict):
        return "a table"
    if isinstance(value, list):
        return f"[{', '.join(map(_show, value[:3]))}{', ...' if len(value) > 3 else ''}]"
    if isinstance(value, bool):
        return str(value).lower()
    text = repr(value) if isinstance(value, (str, float)) or value is None else str(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _join(path: str, key: str) -> str:
    name = key if re.fullmatch(r"[\w-]+", key, re.ASCII) else repr(key)
    return f"{path}.{name}" if path else name


def nearest(name: str, known: Any) -> str:
    """ ", did you mean ...?" with the most similar of the `known` names; empty where none is similar."""
    import difflib  # here, because a right recipe has no use for it

    close = difflib.get_close_matches(name, known, n=1)
    return f", did you mean {close[0]!r}?" if close else ""
