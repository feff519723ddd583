"""What every class of the fake shares: pybind11's strictness, recorded violations, injected failures, the version.

Environment variables, all read when they matter:
FAKE_TENSORRT_VERSION     the version that the module claims (default 11.4.0.106); decides its surface
FAKE_TENSORRT_GPU         the GPU that plans and timing caches are tied to
FAKE_TENSORRT_FAIL        comma list of injected failures, see `FAILURES`
FAKE_TENSORRT_VIOLATIONS  a file that violations are appended to, so that a parent sees those of its children
"""

from __future__ import annotations

import enum
import functools
import inspect
import os
import sys
import typing
from collections.abc import Callable
from typing import Any

VERSION = os.environ.get("FAKE_TENSORRT_VERSION") or "11.4.0.106"
FAILURES = (
    "build_none",  # build_serialized_network returns None without a reason
    "parse_error",  # the parser refuses the first node
    "deserialize_none",
    "enqueue_false",
    "kill_child",  # SIGKILL to this process in the middle of a build
    "out_of_memory",  # the builder logs that the GPU's memory is full and returns None
    "fp32_engine",  # the inspector says that every layer runs in Float
    "hang",  # the build sleeps, deaf to Ctrl-C and without asking its monitor
    "slow",  # every step of a build takes 0.2 s, and the monitor is asked after each
    "no_device",  # Builder() and Runtime() fail as without a driver
)
OURS = ("tensorrt", "tensorrt_rtx")
"""The modules of the fakes: classes of others are users'."""
violations: list[str] = []
"""Every rule of TensorRT that was broken in this process. Each also raised AssertionError where it was broken."""


def violate(rule: str) -> typing.NoReturn:
    violations.append(rule)
    path = os.environ.get("FAKE_TENSORRT_VIOLATIONS")
    if path:
        with open(path, "a") as file:
            file.write(rule + "\n")
    raise AssertionError(f"TensorRT's rules are broken: {rule}")


def failing(name: str) -> bool:
    """Whether a failure is injected."""
    assert name in FAILURES
    asked = [part.strip() for part in os.environ.get("FAKE_TENSORRT_FAIL", "").split(",") if part.strip()]
    unknown = set(asked) - set(FAILURES)
    assert not unknown, f"FAKE_TENSORRT_FAIL: unknown {unknown}"
    return name in asked


def gpu() -> str:
    return os.environ.get("FAKE_TENSORRT_GPU") or "Fake GPU (sm_90)"


def at_least(*version: int) -> bool:
    return tuple(int(part) for part in VERSION.split(".")[: len(version)]) >= version


def _accepts(hint: Any, value: Any) -> bool:
    """pybind11's conversions: an enumeration is no int, a Path is no str, a float is no int."""
    if typing.get_origin(hint) is typing.Union or hint.__class__.__name__ == "UnionType":
        return any(_accepts(option, value) for option in typing.get_args(hint))
    if hint is Any:
        return True
    if hint is int:
        return hasattr(value, "__index__") and not isinstance(value, enum.Enum)
    origin = typing.get_origin(hint) or hint
    if hint is None or hint is type(None):
        return value is None
    return isinstance(value, origin)


def _strict(function: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(function)
    module = sys.modules[function.__module__]

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        bound = signature.bind(*args, **kwargs)  # TypeError for a wrong keyword, as from pybind11
        for name, value in bound.arguments.items():
            wanted = function.__annotations__.get(name)
            if isinstance(wanted, str):
                wanted = eval(wanted, vars(module))
            if name in function.__annotations__ and not _accepts(wanted, value):
                raise TypeError(
                    f"{function.__name__}(): incompatible function arguments: {name}={value!r} is no {wanted}"
                )
        return function(*args, **kwargs)

    return call


class Native:
    """A class of the binding: unknown attributes cannot be set, arguments must have the declared types."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        if cls.__module__.split(".")[0] not in OURS:
            return  # a user's subclass is ordinary Python
        for name, member in list(vars(cls).items()):
            if inspect.isfunction(member) and (name == "__init__" or not name.startswith("_")):
                setattr(cls, name, _strict(member))
            elif isinstance(member, property) and member.fset is not None:
                setattr(cls, name, property(member.fget, _strict(member.fset), member.fdel, member.__doc__))

    def __setattr__(self, name: str, value: Any) -> None:
        ours = type(self).__module__.split(".")[0] in OURS
        if ours and not name.startswith("_") and name != "__class__" and not hasattr(type(self), name):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        super().__setattr__(name, value)


class Made(Native):
    """A class that only the library makes."""

    def __init__(self) -> None:
        raise TypeError(f"tensorrt.tensorrt.{type(self).__name__}: No constructor defined!")

    @classmethod
    def _make(cls, **state: Any) -> Any:
        made = cls.__new__(cls)
        for name, value in state.items():
            object.__setattr__(made, "_" + name, value)
        return made


class Overridable(Native):
    """A class that users derive from: pybind11 demands that their __init__ calls ours."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        return super().__new__(cls)

    def __init__(self) -> None:
        self._initialised = True


def initialised(value: Overridable) -> None:
    """What pybind11's metaclass checks; here when the object is handed over."""
    if not getattr(value, "_initialised", False):
        name = next(c.__name__ for c in type(value).__mro__ if c.__module__.split(".")[0] in OURS)
        raise TypeError(f"tensorrt.tensorrt.{name}.__init__() must be called when overriding __init__")
