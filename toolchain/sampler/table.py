"""A sampler as a table of coefficients: what the runtime reads of it. Imports numpy alone.

Before evaluation i of the network the sampler's memory is `state` [n, B, ...] float32, of which state[0] is the sample:

    model_input = scale_i * state[0]
    e           = network(model_input, timesteps[i])
    state'      = A_i state + b_i e + c_i z_i

and, for a scheduler that clamps its estimate of the picture, the part of `Layout.clamps`.
"""

from __future__ import annotations

import base64
import itertools
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import BundleError, RequestError
from toolchain.sampler.layout import LAYOUTS, Layout

LONGEST = 4096  # evaluations of a table: compiling one takes memory with the square of its length
FORMAT = 2
_LARGEST = float(np.finfo(np.float32).max)

Float32 = NDArray[np.float32]
F = TypeVar("F", bound=np.floating[Any])


def skipped_steps(steps: int, strength: float, *, early_start: bool) -> int:
    """How many of `steps` image to image leaves out, as diffusers counts them. `early_start` is as in ModelSettings."""
    kept = min(steps * strength, steps)
    return int(max(steps - kept, 0)) if early_start else steps - int(kept)


def table_name(scheduler: str, steps: int, *, tokens: int = 0, skip: int = 0) -> str:
    """The name of a table in a bundle: euler/20, flow-euler/20/4096-tokens, euler/20/from-8."""
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


def describe_tables(names: Iterable[str]) -> list[str]:
    """Table names for display, with the step counts of a scheduler as ranges, such as euler/1-50."""
    counts: dict[tuple[str, ...], list[int]] = {}
    for name in names:
        scheduler, steps, tokens, skip = parse_table_name(name)
        rest = [f"{tokens}-tokens"] * (tokens > 0) + ["image to image"] * (skip > 0)
        counts.setdefault((scheduler, *rest), []).append(steps)
    return ["/".join([scheduler, spans(steps), *rest]) for (scheduler, *rest), steps in counts.items()]


def spans(numbers: Iterable[int]) -> str:
    """Whole numbers as ranges, such as 1-50,100."""
    ranges: list[list[int]] = []
    for number in sorted(set(numbers)):
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1][1:] = [number]
        else:
            ranges.append([number])
    return ",".join("-".join(map(str, ends)) for ends in ranges)


@dataclass(frozen=True, eq=False)
class SamplerTable:
    """The coefficients of one scheduler for one number of steps.

    name              canonical spec of the scheduler that it was compiled from
    steps             what the user asked for; second-order methods evaluate the network more often
    timesteps         float32 [T], what the network is given at each evaluation
    rows              float32 [T, width of its layout], see `Layout`
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
    def layout(self) -> Layout:
        """The smallest layout that a step graph must have for this table."""
        return LAYOUTS[self.rows.shape[1]]

    @property
    def states(self) -> int:
        """How many states are used, the sample included."""
        a, b, c, _ = split(self.rows)
        used = (a != 0).any(axis=(0, 1)) | (a != 0).any(axis=(0, 2)) | (b != 0).any(axis=0) | (c != 0).any(axis=0)
        clamp = split_clamp(self.rows)
        if clamp is not None:
            used |= (clamp[3] != 0).any(axis=0)
        return max(1, int(np.flatnonzero(used).max(initial=0)) + 1)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values: of the rows, the columns that are not zero throughout, exactly."""
        columns = np.flatnonzero(self.rows.view(np.uint32).any(axis=0))
        numbers = np.column_stack([self.timesteps, self.rows[:, columns]]).astype("<f4")
        return {
            "format": FORMAT,
            "name": self.name,
            "steps": self.steps,
            "start": self.start,
            "init_noise_sigma": self.init_noise_sigma,
            "noising": None if self.noising is None else list(self.noising),
            "noise_draws": "".join(map(str, self.noise_draws)),
            "width": self.rows.shape[1],
            "columns": columns.tolist(),
            "numbers": base64.b64encode(numbers.tobytes()).decode("ascii"),
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
        columns, draws = data["columns"], tuple(map(int, data["noise_draws"]))
        if not all(0 <= low < high for low, high in itertools.pairwise([*columns, data["width"]])):
            raise _damaged("columns", f"columns below {data['width']}, each once and in order", columns)
        numbers = _numbers(data["numbers"], (len(draws), 1 + len(columns)))
        rows = np.zeros((len(draws), data["width"]), np.float32)
        rows[:, columns] = numbers[:, 1:]
        return cls(
            name=data["name"],
            steps=data["steps"],
            timesteps=np.ascontiguousarray(numbers[:, 0]),
            rows=rows,
            init_noise_sigma=float(data["init_noise_sigma"]),
            noise_draws=draws,
            start=data["start"],
            noising=None if data["noising"] is None else (float(data["noising"][0]), float(data["noising"][1])),
        )


def _numbers(text: str, shape: tuple[int, int]) -> Float32:
    try:
        numbers = np.frombuffer(base64.b64decode(text, validate=True), "<f4").reshape(shape).astype(np.float32)
    except ValueError as error:
        raise _damaged("numbers", f"{shape[0]} x {shape[1]} float32 in base64", error) from error
    if not np.isfinite(numbers).all():
        raise _damaged("numbers", "finite numbers", "infinity or NaN")
    return numbers


def split(rows: NDArray[F]) -> tuple[NDArray[F], NDArray[F], NDArray[F], NDArray[F]]:
    """Rows [..., width] as A [..., n, n], b [..., n], c [..., n] and scale [...]: views, nothing is copied."""
    n = LAYOUTS[rows.shape[-1]].states
    a = rows[..., : n * n].reshape(*rows.shape[:-1], n, n)
    return a, rows[..., n * n : n * n + n], rows[..., n * n + n : n * n + 2 * n], rows[..., n * n + 2 * n]


def split_clamp(rows: NDArray[F]) -> tuple[NDArray[F], NDArray[F], NDArray[F], NDArray[F]] | None:
    """u, v and limit [...] and w [..., n] of rows that clamp, as views; None for a layout that does not."""
    layout = LAYOUTS[rows.shape[-1]]
    first = Layout(layout.states).width
    return (*np.moveaxis(rows[..., first : first + 3], -1, 0), rows[..., first + 3 :]) if layout.clamps else None


def fit(rows: Float32, layout: Layout) -> Float32:
    """The same coefficients in a layout of the same size or a larger one. RequestError for a smaller one."""
    given = LAYOUTS[rows.shape[-1]]
    if given == layout:
        return rows
    if given.states > layout.states or given.clamps > layout.clamps:
        needs = "clamps its estimate of the picture" if given.clamps > layout.clamps else f"has {given.states} states"
        raise RequestError(
            f"the scheduler {needs}, and the step of this bundle has no room for that",
            expected=layout,
            got=given,
            hint="build the bundle again, or take another scheduler",
        )
    wide = np.zeros((len(rows), layout.width), np.float32)
    n, clamp, target = given.states, split_clamp(rows), split_clamp(wide)
    a, b, c, scale = split(wide)
    a[:, :n, :n], b[:, :n], c[:, :n], scale[:] = split(rows)
    if clamp is not None and target is not None:
        target[0][:], target[1][:], target[2][:], target[3][:, :n] = clamp
    return wide


def step_reference(row: Float32, state: Float32, model_output: Float32, noise: Float32) -> Float32:
    """One update in numpy: state [n, B, ...], model_output and noise [B, ...], all float32 -> the next state.

    What the compiled step graph must compute; unused states are multiplied by zero, so they must be finite.
    """
    a, b, c, _ = split(row)
    wide = (-1,) + (1,) * model_output.ndim
    mixed: Float32 = np.tensordot(a, state, axes=1) + b.reshape(wide) * model_output + c.reshape(wide) * noise
    clamp = split_clamp(row)
    if clamp is not None:
        u, v, limit, w = clamp
        mixed = mixed + w.reshape(wide) * np.clip(u * state[0] + v * model_output, -limit, limit)
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
    "noise_draws": (
        f"1 to {LONGEST} of 0 and 1",
        lambda v: isinstance(v, str) and re.fullmatch("[01]+", v) is not None and len(v) <= LONGEST,
    ),
    "width": ("one of " + ", ".join(map(str, LAYOUTS)), lambda v: type(v) is int and v in LAYOUTS),
    "columns": ("a list of whole numbers from 0", lambda v: _is_list(v, lambda n: _is_count(n, 0))),
    "numbers": ("base64", lambda v: isinstance(v, str)),
}
