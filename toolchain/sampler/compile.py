"""A diffusers scheduler -> its table: the linear state machine behind it, found by driving it with one-hot inputs.

For T evaluations of the network the inputs are u = [x_T, e_0 .. e_T-1, z_0 .. z_T-1]: initial latents, network outputs
and noises. Given basis vectors in place of images, the real scheduler shows the sample before each step as coefficients
of u. The rank of what the rest of a trajectory needs of the inputs so far is the number of states; a basis of it, the
sample first, gives the coefficients of each step. Every table is then run against the scheduler that it came from.

Build time only: imports torch, and diffusers through `schedulers`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch.overrides import TorchFunctionMode

from toolchain.errors import RequestError, SamplerError
from toolchain.sampler.schedulers import SchedulerSpec, create, parse, quiet, step_kwargs
from toolchain.sampler.table import MAX_EVALUATIONS, MAX_STATES, ROW, SamplerTable, split, step_reference

TOLERANCE = 1e-5  # of `Errors.exact`; 1.6e-6 after 200 evaluations was the most seen
FLOAT32_TOLERANCE = 1e-2  # of `Errors.float32`: only shows that float64 did not run another algorithm
RANK_TOLERANCE = 1e-9  # of the largest coefficient; the trace is float64, so what is smaller is rounding
# Steps ahead that are searched for what a step must remember. Solvers look back at most four evaluations, and the whole
# future of a long schedule would make the search cubic in its length. A state missed here fails the verification.
WINDOW = 16

Float64 = NDArray[np.float64]


@dataclass(frozen=True)
class Schedule:
    """A diffusers scheduler made ready for one trajectory: `timesteps` [T] are its own from index `start` on."""

    scheduler: Any
    timesteps: torch.Tensor
    step_kwargs: Mapping[str, Any]
    start: int

    def model_input(self, index: int, sample: torch.Tensor) -> torch.Tensor:
        """What the network is given; flow-matching schedulers have no scaling."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        scaled: torch.Tensor = self.scheduler.scale_model_input(sample, self.timesteps[index])
        return scaled

    def step(self, index: int, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        arguments = (model_output, self.timesteps[index], sample)
        following: torch.Tensor = self.scheduler.step(*arguments, **self.step_kwargs, return_dict=False)[0]
        return following


def compile_table(
    spec: str | SchedulerSpec,
    steps: int,
    model_config: Mapping[str, Any],
    *,
    skip: int = 0,
    tokens: int = 0,
    linear_sigmas: bool = False,
) -> SamplerTable:
    """The verified table of a scheduler for `steps` steps of the model whose scheduler_config.json is given.

    skip           steps that image to image leaves out; the initial state is then the noised latents
    tokens         of the picture, for schedulers that shift by their number
    linear_sigmas  see `ModelSettings`

    RequestError for a wrong spec, steps or skip; SamplerError for a scheduler that no table can reproduce.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    fresh = prepare(spec, steps, model_config, skip=skip, tokens=tokens, linear_sigmas=linear_sigmas)
    schedule = copy.deepcopy(fresh)  # a trajectory uses a scheduler up, and some take half a second to make
    with _refusals(spec.canonical):
        noising = _noising(schedule)  # before the trajectory, which moves the scheduler on
        response, scales, draws = _trace(schedule)
        table = SamplerTable(
            name=spec.canonical,
            steps=steps,
            timesteps=schedule.timesteps.to(torch.float32).numpy(),
            rows=_realise(spec.canonical, response, scales),
            init_noise_sigma=float(getattr(schedule.scheduler, "init_noise_sigma", 1.0)),
            noise_draws=draws,
            start=fresh.start,
            noising=noising,
        )
    verify_table(table, lambda: copy.deepcopy(fresh))
    return table


def prepare(
    spec: SchedulerSpec,
    steps: int,
    model_config: Mapping[str, Any],
    *,
    skip: int = 0,
    tokens: int = 0,
    linear_sigmas: bool = False,
) -> Schedule:
    """The diffusers scheduler itself, set up as a pipeline does. Errors as for `compile_table`."""
    if steps < 1:
        raise RequestError("a picture takes at least one step", expected="steps from 1", got=steps)
    scheduler = create(spec, model_config)
    with _refusals(f"{spec.canonical} with {steps} steps"):
        scheduler.set_timesteps(**_timing(scheduler, steps, tokens, linear_sigmas))
    timesteps: torch.Tensor = scheduler.timesteps
    if len(timesteps) > MAX_EVALUATIONS:
        raise RequestError(
            f"{spec.canonical} evaluates the network {len(timesteps)} times in {steps} steps",
            expected=f"at most {MAX_EVALUATIONS} evaluations",
            got=len(timesteps),
        )
    start = skip * scheduler.order
    if not 0 <= start < len(timesteps):
        raise RequestError("no step is left of the schedule", expected=f"0 to {steps - 1} steps left out", got=skip)
    # Text to image leaves the first index to the scheduler; only image to image sets it.
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return Schedule(scheduler, timesteps[start:], step_kwargs(spec, scheduler), start)


def _timing(scheduler: Any, steps: int, tokens: int, linear_sigmas: bool) -> dict[str, Any]:
    """Arguments of set_timesteps, as the diffusers pipelines of flow-matching models give them."""
    config = scheduler.config
    arguments: dict[str, Any] = {"num_inference_steps": steps}
    if linear_sigmas and not config.get("use_flow_sigmas"):
        arguments = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if config.get("use_dynamic_shifting"):
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        slope = (high - low) / (many - few)
        arguments["mu"] = tokens * slope + (low - slope * few)
    return arguments


@contextmanager
def _refusals(what: str) -> Iterator[None]:
    """Whatever diffusers raises, as a SamplerError, and its log lines and warnings not at all."""
    try:
        with quiet():
            yield
    except (RequestError, SamplerError):
        raise
    except Exception as error:
        raise SamplerError(f"diffusers refuses {what}", got=f"{type(error).__name__}: {error}") from error


class _Noise(TorchFunctionMode):
    """While active, `torch.randn` and `randn_like` give `draw()`, and `wide` tensors are not narrowed to float32.

    Every diffusers scheduler draws through torch.randn in the end. Some compute in float32 whatever they are given,
    which would bury small coefficients in rounding; only tensors of the sample's shape are kept, not sigmas.
    """

    def __init__(self, draw: Callable[[], torch.Tensor], wide: torch.Size | None = None) -> None:
        super().__init__()
        self.draw = draw
        self.wide = wide

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _STANDARD_NORMAL:
            return self.draw()
        if func in _OTHER_RANDOM:
            raise SamplerError(
                f"the scheduler draws random numbers with {func.__name__}", expected="standard normal noise"
            )
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and args[0].dtype == torch.float64 and args[0].shape == self.wide:
            return args[0] if result.dtype == torch.float32 else result
        return result


_STANDARD_NORMAL = frozenset({torch.randn, torch.randn_like})
_OTHER_RANDOM = frozenset(
    {torch.rand, torch.rand_like, torch.normal, torch.randint, torch.bernoulli, torch.multinomial, torch.Tensor.normal_}
)
_CASTS = frozenset({torch.Tensor.to, torch.Tensor.float, torch.Tensor.type})


def _drive(
    schedule: Schedule,
    sample: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    model: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    wide: torch.Size | None = None,
) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """A trajectory of the real scheduler: the T + 1 samples, and how many noises each evaluation drew.

    noise(index) replaces the draw of an evaluation; model(index, sample, model_input) replaces the network.
    """
    counts = [0] * len(schedule.timesteps)
    samples = [sample]

    def draw() -> torch.Tensor:
        index = len(samples) - 1
        counts[index] += 1
        if counts[index] > 1:
            raise SamplerError("the scheduler draws more than one noise for one evaluation", expected="0 or 1")
        return noise(index)

    with torch.no_grad(), _refusals(type(schedule.scheduler).__name__), _Noise(draw, wide):
        for index in range(len(schedule.timesteps)):
            output = model(index, samples[-1], schedule.model_input(index, samples[-1]))
            samples.append(schedule.step(index, output, samples[-1]).clone())
    return samples, tuple(counts)


def _trace(schedule: Schedule) -> tuple[Float64, list[float], tuple[int, ...]]:
    """Coefficients of every sample in u [T + 1, 1 + 2T], the input scale of each evaluation, and its noise draws."""
    evaluations = len(schedule.timesteps)
    scales: list[float] = []

    def one_hot(column: int) -> torch.Tensor:
        basis = torch.zeros(1, 1 + 2 * evaluations, 1, 1, dtype=torch.float64)
        basis[0, column] = 1.0
        return basis

    def model(index: int, sample: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        largest = sample.abs().argmax()
        scales.append(float(model_input.flatten()[largest] / sample.flatten()[largest]))
        return one_hot(1 + index)

    start = one_hot(0)
    samples, draws = _drive(schedule, start, lambda index: one_hot(1 + evaluations + index), model, start.shape)
    return torch.stack(samples).double().flatten(1).numpy(), scales, draws


def _realise(name: str, response: Float64, scales: list[float]) -> NDArray[np.float32]:
    """Rows [T, 25] of the smallest state machine with this response, its first state the sample itself."""
    evaluations = len(scales)
    if not (np.isfinite(response).all() and np.isfinite(scales).all()):
        raise SamplerError(
            f"{name} divides by zero for this model",
            expected="finite coefficients",
            hint="take fewer steps; a noise schedule that ends at zero signal needs a model trained for v_prediction",
        )
    rows = np.zeros((evaluations, ROW))
    a, b, c, scale = split(rows)
    scale[:] = scales
    basis = _basis(name, response, 0)
    for i in range(evaluations):
        following = _basis(name, response, i + 1)
        d, e = len(basis), len(following)
        # The old basis is orthogonal and zero outside what is past, so projecting on it solves the least squares.
        a[i, :e, :d] = following @ basis.T / np.square(basis).sum(axis=1)
        b[i, :e] = following[:, 1 + i]
        c[i, :e] = following[:, 1 + evaluations + i]
        basis = following
    return rows.astype(np.float32)


def _basis(name: str, response: Float64, i: int) -> Float64:
    """What the samples from x_i on know of the past, [D, 1 + 2T]: x_i, then orthogonal directions, largest first."""
    past = response[i : i + WINDOW].copy()
    evaluations = response.shape[1] // 2
    past[:, 1 + i : 1 + evaluations] = 0.0
    past[:, 1 + evaluations + i :] = 0.0
    sample = past[0]
    if not sample.any():
        raise SamplerError(
            f"{name} multiplies its sample by zero", where=f"before evaluation {i}", hint="take more steps"
        )
    rest = past - np.outer(past @ sample / (sample @ sample), sample)
    _, weights, directions = np.linalg.svd(rest, full_matrices=False)
    rank = int((weights > RANK_TOLERANCE * np.linalg.norm(past)).sum())
    if 1 + rank > MAX_STATES:
        raise SamplerError(
            f"{name} is not a linear state machine with at most {MAX_STATES} states",
            expected=f"at most {MAX_STATES} states",
            got=f"{1 + rank} states before evaluation {i}",
            hint="take a lower order, or another scheduler",
        )
    return np.vstack([sample, weights[:rank, None] * directions[:rank]])


def _noising(schedule: Schedule) -> tuple[float, float] | None:
    """(a, b) of a * latents + b * noise, as the scheduler noises latents for the first timestep of the schedule."""
    scheduler, first = schedule.scheduler, schedule.timesteps[:1]
    one, zero = torch.ones(1, 1, 1, 1, dtype=torch.float64), torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    if hasattr(scheduler, "scale_noise"):  # flow matching has its own name and order of arguments
        pair = scheduler.scale_noise(one, first, zero), scheduler.scale_noise(zero, first, one)
    elif hasattr(scheduler, "add_noise"):
        pair = scheduler.add_noise(one, zero, first), scheduler.add_noise(zero, one, first)
    else:
        return None
    return float(pair[0]), float(pair[1])


class Errors(NamedTuple):
    """Largest differences at the end of a trajectory, relative to its largest value.

    exact    table in float32 against the scheduler in float64: what the table gets wrong
    float32  table against the scheduler in float32, as users run it: adds the scheduler's own rounding, which can be
             the larger part where few steps cross much noise (2e-3 for Euler from zero terminal SNR in two steps)
    """

    exact: float
    float32: float


def table_errors(table: SamplerTable, make: Callable[[], Schedule]) -> Errors:
    """Run scheduler and table against the same nonlinear model with the same noises on latents [1, 4, 8, 8].

    `make` prepares a fresh scheduler. SamplerError when it draws other noises than the table says.
    """
    noises = torch.randn(table.evaluations + 2, 1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    signal, sigma = table.noising if table.start and table.noising else (0.0, table.init_noise_sigma)
    sample = signal * noises[-2] + sigma * noises[-1]
    found = _by_table(table, sample, noises)

    def difference(dtype: torch.dtype) -> float:
        wanted = _by_scheduler(table, make(), sample.to(dtype), noises.to(dtype))
        return float(np.abs(found - wanted).max() / np.abs(wanted).max())

    return Errors(exact=difference(torch.float64), float32=difference(torch.float32))


def _test_model(model_input: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A network that is not linear in the sample and feels a timestep that is off by one."""
    return torch.tanh(0.3 * model_input + 0.5 * torch.sin(timestep.to(torch.float32)))


def _by_table(table: SamplerTable, sample: torch.Tensor, noises: torch.Tensor) -> Float64:
    state = np.zeros((MAX_STATES, *sample.shape), np.float32)
    state[0] = sample.numpy()
    for row, timestep, noise in zip(table.rows, torch.from_numpy(table.timesteps), noises, strict=False):
        output = _test_model(torch.from_numpy(row[-1] * state[0]), timestep)
        state = step_reference(row, state, output.numpy(), noise.numpy())
    return np.asarray(state[0], np.float64)


def _by_scheduler(table: SamplerTable, schedule: Schedule, sample: torch.Tensor, noises: torch.Tensor) -> Float64:
    def model(index: int, _: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        return _test_model(model_input, schedule.timesteps[index])

    samples, draws = _drive(schedule, sample, lambda index: noises[index], model, sample.shape)
    if draws != table.noise_draws:
        raise SamplerError(
            f"the table of {table.name} draws other noises than its scheduler", expected=draws, got=table.noise_draws
        )
    return np.asarray(samples[-1].double().numpy())


def verify_table(table: SamplerTable, make: Callable[[], Schedule]) -> Errors:
    """`table_errors` where they are within TOLERANCE and FLOAT32_TOLERANCE, else SamplerError."""
    errors = table_errors(table, make)
    if not (errors.exact <= TOLERANCE and errors.float32 <= FLOAT32_TOLERANCE):  # written so that NaN fails
        raise SamplerError(
            f"{table.name} is not a linear state machine with at most {MAX_STATES} states",
            expected=f"the scheduler's own result to {TOLERANCE:.0e}, and to {FLOAT32_TOLERANCE:.0e} in float32",
            got=f"{errors.exact:.1e} and {errors.float32:.1e} after {table.evaluations} evaluations",
            hint="name another scheduler, such as euler or dpm++2m",
        )
    return errors
