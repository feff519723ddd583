"""A sampler as a table of coefficients: what the runtime reads of it. Imports numpy alone.

Before evaluation i of the network the sampler's memory is `state` [4, B, ...] float32, of which state[0] is the sample:

    model_input = scale_i * state[0]
    e           = network(model_input, timesteps[i])
    state'      = A_i state + b_i e + c_i z_i
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import BundleError

MAX_STATES = 4
ROW = MAX_STATES * MAX_STATES + MAX_STATES + MAX_STATES + 1
MAX_EVALUATIONS = 1024  # rows that the compiled step graph has room for
FORMAT = 1
_LARGEST = float(np.finfo(np.float32).max)

Float32 = NDArray[np.float32]
F = TypeVar("F", bound=np.floating[Any])


def table_name(scheduler: str, steps: int, *, tokens: int = 0, skip: int = 0) -> str:
    """What a table is called in a bundle: euler/20, flow-euler/20/4096-tokens, euler/20/from-8."""
    parts = [scheduler, str(steps), *([f"{tokens}-tokens"] if tokens else []), *([f"from-{skip}"] if skip else [])]
    return "/".join(parts)


def parse_table_name(name: str) -> tuple[str, int, int, int]:
    """(scheduler, steps, tokens, skip) of a `table_name`. ValueError for any other text."""
    scheduler, steps, *rest = name.split("/")
    numbers = {"tokens": 0, "from": 0}
    for part in rest:
        first, _, second = part.partition("-")
        numbers["from" if first == "from" else "tokens"] = int(second if first == "from" else first)
    return scheduler, int(steps), numbers["tokens"], numbers["from"]


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The coefficients of one scheduler for one number of steps.

    name              canonical spec of the scheduler that it was compiled from
    steps             what the user asked for; second-order methods evaluate the network more often
    timesteps         float32 [T], what the network is given at each evaluation
    rows              float32 [T, 25]: A (row-major [4, 4]), b (4), c (4), scale (1)
    init_noise_sigma  the initial latents of text to image are this times standard normal noise
    noise_draws       [T] of 0 or 1: noise tensors that the scheduler draws from the generator at this evaluation; drawn
                      even where c is zero, or the random stream would leave diffusers' own
    start             index in the scheduler's own timesteps of the first row; above 0 for image to image
    noising           (a, b) of a * latents + b * noise, with which image to image begins at `start`; None where the
                      scheduler cannot noise
    """

    name: str
    steps: int
    timesteps: Float32
    rows: Float32
    init_noise_sigma: float
    noise_draws: tuple[int, ...]
    start: int = 0
    noising: tuple[float, float] | None = None

    @property
    def evaluations(self) -> int:
        """T, how often the network runs."""
        return len(self.timesteps)

    @property
    def stochastic(self) -> bool:
        """Whether the loop needs a random generator."""
        return any(self.noise_draws)

    @property
    def states(self) -> int:
        """How many of the four states carry anything, counting the sample itself."""
        a, b, c, _ = split(self.rows)
        used = (a != 0).any(axis=(0, 1)) | (a != 0).any(axis=(0, 2)) | (b != 0).any(axis=0) | (c != 0).any(axis=0)
        return max(1, int(np.flatnonzero(used).max(initial=0)) + 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values. A float32 is written as the double that equals it, so reading it back is exact."""
        return {
            "format": FORMAT,
            "name": self.name,
            "steps": self.steps,
            "start": self.start,
            "init_noise_sigma": self.init_noise_sigma,
            "noising": None if self.noising is None else list(self.noising),
            "noise_draws": list(self.noise_draws),
            "timesteps": self.timesteps.tolist(),
            "rows": self.rows.tolist(),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> SamplerTable:
        """The table that `to_json` wrote; BundleError naming the field for anything that it cannot have written."""
        if not isinstance(data, Mapping) or data.get("format") != FORMAT:
            got = data.get("format") if isinstance(data, Mapping) else type(data).__name__
            raise _damaged("format", FORMAT, got)
        if set(data) != _FIELDS.keys() | {"format"}:
            raise _damaged("fields", ", ".join(sorted({"format", *_FIELDS})), ", ".join(sorted(map(str, data))))
        for field, (expected, holds) in _FIELDS.items():
            if not holds(data[field]):
                raise _damaged(field, expected, data[field])
        evaluations = len(data["timesteps"])
        for field in ("rows", "noise_draws"):
            if len(data[field]) != evaluations:
                raise _damaged(
                    field, f"one entry for each of the {evaluations} timesteps", f"{len(data[field])} entries"
                )
        return cls(
            name=data["name"],
            steps=data["steps"],
            timesteps=np.array(data["timesteps"], np.float32),
            rows=np.array(data["rows"], np.float32),
            init_noise_sigma=float(data["init_noise_sigma"]),
            noise_draws=tuple(data["noise_draws"]),
            start=data["start"],
            noising=None if data["noising"] is None else (float(data["noising"][0]), float(data["noising"][1])),
        )


def split(rows: NDArray[F]) -> tuple[NDArray[F], NDArray[F], NDArray[F], NDArray[F]]:
    """Rows [..., 25] as A [..., 4, 4], b [..., 4], c [..., 4] and scale [...]: views, nothing is copied."""
    n = MAX_STATES
    a = rows[..., : n * n].reshape(*rows.shape[:-1], n, n)
    return a, rows[..., n * n : n * n + n], rows[..., n * n + n : n * n + 2 * n], rows[..., -1]


def step_reference(row: Float32, state: Float32, model_output: Float32, noise: Float32) -> Float32:
    """One update in numpy: state [4, B, ...], model_output and noise [B, ...], all float32 -> the next state.

    What the compiled step graph must compute; unused states are multiplied by zero, so they must be finite.
    """
    a, b, c, _ = split(row)
    wide = (-1,) + (1,) * model_output.ndim
    mixed: Float32 = np.tensordot(a, state, axes=1) + b.reshape(wide) * model_output + c.reshape(wide) * noise
    return mixed.astype(np.float32, copy=False)


def _damaged(field: str, expected: object, got: object) -> BundleError:
    text = repr(got) if not isinstance(got, str) else got
    return BundleError(
        f"a sampler table has a wrong {field}",
        expected=expected,
        got=text if len(text) <= 200 else text[:200] + "...",
        hint="build the bundle again",
    )


def _is_count(value: object, least: int) -> bool:
    return type(value) is int and value >= least


def _is_number(value: object) -> bool:
    """A JSON number that float32 can hold; infinities and NaN compare false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST


def _is_list(value: object, holds: Callable[[Any], bool], length: int | None = None) -> bool:
    return isinstance(value, list) and (length is None or len(value) == length) and all(map(holds, value))


# Every field of the JSON but "format": what it must be, in words and as a check.
_FIELDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "name": ("a scheduler spec", lambda v: isinstance(v, str) and v != ""),
    "steps": ("a whole number from 1", lambda v: _is_count(v, 1)),
    "start": ("a whole number from 0", lambda v: _is_count(v, 0)),
    "init_noise_sigma": ("a finite number", _is_number),
    "noising": ("null or two finite numbers", lambda v: v is None or _is_list(v, _is_number, 2)),
    "noise_draws": ("a list of 0 and 1", lambda v: _is_list(v, lambda n: type(n) is int and n in (0, 1))),
    "timesteps": (
        f"1 to {MAX_EVALUATIONS} finite numbers",
        lambda v: _is_list(v, _is_number) and 1 <= len(v) <= MAX_EVALUATIONS,
    ),
    "rows": (f"rows of {ROW} finite numbers", lambda v: _is_list(v, lambda row: _is_list(row, _is_number, ROW))),
}
