"""What may follow a scheduler's name: options with their values, and the text form of both. Imports nothing heavy."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from toolchain.errors import RequestError

# Settings of diffusers constructors; `order`, `spacing` and `eta` take a value. `eta` is an argument of `step`, and a
# list of timesteps or sigmas one of `set_timesteps`.
FLAGS: dict[str, tuple[str, Any]] = {
    "karras": ("use_karras_sigmas", True),
    "exponential": ("use_exponential_sigmas", True),
    "beta": ("use_beta_sigmas", True),
    "sde": ("algorithm_type", "sde-dpmsolver++"),
    "rescale-zero-snr": ("rescale_betas_zero_snr", True),
}
SIGMA_FLAGS = ("karras", "exponential", "beta")
_SPACINGS = ("leading", "trailing", "linspace")
VALUES: dict[str, str] = {"order": "solver_order", "spacing": "timestep_spacing"}
LISTS = ("timesteps", "sigmas")
OPTIONS = (*FLAGS, *VALUES, "eta", *LISTS)

OptionValue = bool | int | float | str | tuple[float, ...]


@dataclass(frozen=True)
class SchedulerSpec:
    """A parsed spec. Two specs that mean the same are equal: options are sorted and their values normalised."""

    name: str
    options: tuple[tuple[str, OptionValue], ...] = ()

    @property
    def canonical(self) -> str:
        """The spec as text, which `parse` reads back."""
        texts = [key if value is True else f"{key}={_text(value)}" for key, value in self.options]
        return f"{self.name}:{','.join(texts)}" if texts else self.name

    @property
    def lists(self) -> dict[str, Any]:
        """The list of timesteps or of sigmas that takes the place of a number of steps, by its name; at most one.
        Sigmas are an array, for UniPC computes with what it is given."""
        given = {key: [_whole(x) for x in value] for key, value in self.options if isinstance(value, tuple)}
        return {key: np.array(values, np.float64) if key == "sigmas" else values for key, values in given.items()}


def with_list(spec: str, key: str, values: Iterable[float]) -> str:
    """The spec with a list of `timesteps` or `sigmas`. RequestError for what is no such list."""
    try:
        numbers = [float(x) for x in values] if not isinstance(values, str) else None
    except (TypeError, ValueError):
        numbers = None
    if numbers is None:
        raise RequestError(f"{key} is not a list of numbers", expected="numbers from 0", got=repr(values))
    return f"{spec}{',' if ':' in spec else ':'}{key}={_text(tuple(numbers))}"


def _text(value: OptionValue) -> str:
    return " ".join(str(_whole(x)) for x in value) if isinstance(value, tuple) else str(value)


def _whole(number: float) -> float:
    return int(number) if number.is_integer() else number


def _numbers(text: str) -> tuple[float, ...] | None:
    try:
        numbers = tuple(float(x) + 0.0 for x in text.split())
    except ValueError:
        return None
    return numbers if numbers and all(0 <= x < math.inf for x in numbers) else None


def read_option(key: str, value: str | None) -> OptionValue:
    """The value of an option from its text, None where it has none. RequestError."""
    if key in FLAGS:
        if value is not None:
            raise RequestError(f"the scheduler option {key} takes no value", expected=key, got=f"{key}={value}")
        return True
    checks: dict[str, tuple[str, Callable[[str], OptionValue | None]]] = {
        "order": ("1, 2 or 3", lambda v: int(v) if v in ("1", "2", "3") else None),
        "spacing": (", ".join(_SPACINGS), lambda v: v if v in _SPACINGS else None),
        "eta": ("a number from 0 to 1", _unit),
        **dict.fromkeys(LISTS, ("numbers from 0 with a space between them", _numbers)),
    }
    if key not in checks:
        close = difflib.get_close_matches(key, OPTIONS, n=1, cutoff=0.5)
        raise RequestError(
            f"no scheduler option is called {key!r}",
            expected=", ".join(OPTIONS),
            got=key,
            hint=f"did you mean {close[0]}?" if close else None,
        )
    expected, read = checks[key]
    parsed = read(value) if value is not None else None
    if parsed is None:
        got = key if value is None else f"{key}={value}"
        raise RequestError(f"the scheduler option {key} has a wrong value", expected=f"{key}={expected}", got=got)
    return parsed


def _unit(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number + 0.0 if 0.0 <= number <= 1.0 else None  # + 0.0 makes -0.0 the same spec as 0.0
