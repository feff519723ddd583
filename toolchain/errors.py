"""Every error that a user can meet: one class per action that the reader must take.

The message says what went wrong, where, what was expected, what was found, and the next command. The command line turns
`exit_code` into the process's exit status and prints `str(error)`; nothing else does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class DiffbuildError(Exception):
    """Base of every error raised on purpose.

    `what` is one sentence; the others are optional and printed one to a line. Exit codes: 1 could not, 2 wrong usage, 3
    done, but a gate failed.
    """

    exit_code = 1

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        expected: object = None,
        got: object = None,
        hint: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.expected = expected
        self.got = got
        self.hint = hint
        details = {"where": where, "expected": expected, "got": got, "hint": hint}
        super().__init__("\n".join([what, *(f"  {k}: {v}" for k, v in details.items() if v is not None)]))


class UsageError(DiffbuildError):
    """The call is wrong: correct the arguments."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe is wrong: correct the file. Lists every problem at once."""


class RequestError(UsageError):
    """A generation request is wrong or asks for what the bundle does not hold."""


class ModelError(DiffbuildError):
    """The model folder is missing, incomplete, unsafe or of an unsupported class."""


class WeightsError(ModelError):
    """A weight file is damaged, or its tensors are not those of the model."""


class CalibrationError(DiffbuildError):
    """Ranges of activations are missing, damaged, of no use, or of another model: calibrate again."""


class SamplerError(DiffbuildError):
    """A scheduler cannot be compiled into a table."""


class ExportError(DiffbuildError):
    """A component could not be turned into a graph that holds its contract."""


class EngineError(DiffbuildError):
    """A backend cannot build, open or run an engine."""


class GateError(DiffbuildError):
    """A quantised bundle was built and misses its recipe's limits: change the recipe, or build without the gate.

    `gate` is the result of its check, as the bundle says it.
    """

    exit_code = 3

    def __init__(self, what: str, gate: Mapping[str, Any], *, where: object, got: str, hint: str) -> None:
        super().__init__(what, where=where, expected="every comparison within its limit", got=got, hint=hint)
        self.gate = gate


class StoreError(DiffbuildError):
    """The artifact store cannot be read or written, or an artifact in it is damaged."""


class BundleError(DiffbuildError):
    """A bundle is incomplete, changed since it was built, or made for another device or version."""


class BudgetError(DiffbuildError):
    """A model cannot be tuned to what was asked for: ask for less, or quantise less."""

    exit_code = 3


class SignatureError(BundleError):
    """A bundle is not signed by the key that is trusted: do not run it before you know who built it."""


def first_line(error: Exception) -> str:
    """What an error says, without the advice that follows; its class where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
