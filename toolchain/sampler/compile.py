"""A diffusers scheduler -> its table: the linear state machine behind it, found by driving it with one-hot inputs.

For T evaluations of the network the inputs are u = [x_T, e_0 .. e_T-1, z_0 .. z_T-1]: initial latents, network outputs
and noises. Given basis vectors in place of images, the real scheduler shows the sample before each step as coefficients
of u. The rank of what the rest of a trajectory needs of the inputs so far is the number of states; a basis of it, the
sample first, gives the coefficients of each step. Every table is then run against the scheduler that it came from.

A scheduler that clamps its estimate of the picture is linear in u and the clamped estimates k_0 .. k_T-1: basis vectors
of their own take the place of what it clamps, and how that comes from the sample and e_i goes into the table too.

Build time only: imports torch, and diffusers through `schedulers`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.errors import RequestError, SamplerError
from toolchain.sampler.layout import LAYOUTS, PLAIN, Layout
from toolchain.sampler.schedulers import create, parse, step_kwargs, steps_of
from toolchain.sampler.spec import SchedulerSpec
from toolchain.sampler.table import LONGEST, SamplerTable, split, split_clamp
from toolchain.sampler.trajectory import Schedule, drive, refusals
from toolchain.sampler.verify import verify_table

MOST_STATES = max(layout.states for layout in LAYOUTS.values())
RANK_TOLERANCE = 1e-9  # of the largest coefficient; the trace is float64, so what is smaller is rounding
# Steps ahead that are searched for what a step must remember. Solvers look back at most four evaluations, and the whole
# future of a long schedule would make the search cubic in its length. A state missed here fails the verification.
WINDOW = 16

Float64 = NDArray[np.float64]


def compile_table(
    spec: str | SchedulerSpec,
    steps: int,
    model_config: Mapping[str, Any],
    *,
    skip: int = 0,
    tokens: int = 0,
    linear_sigmas: bool = False,
) -> SamplerTable:
    """The verified table of a scheduler for `steps` steps of the model whose scheduler_config.json is given. A list of
    timesteps or sigmas in the spec takes the place of `steps`.

    skip           steps that image to image leaves out; the initial state is then the noised latents
    tokens         of the picture, for schedulers that shift by their number
    linear_sigmas  see `ModelSettings`

    RequestError for a wrong spec, steps or skip; SamplerError for a scheduler that no table can reproduce.
    """
    spec = parse(spec) if isinstance(spec, str) else spec
    fresh = prepare(spec, steps, model_config, skip=skip, tokens=tokens, linear_sigmas=linear_sigmas)
    schedule = copy.deepcopy(fresh)  # a trajectory uses a scheduler up, and some take half a second to make
    with refusals(spec.canonical):
        noising = _noising(schedule)  # before the trajectory, which moves the scheduler on
        trace = _trace(schedule)
        table = SamplerTable(
            name=spec.canonical,
            steps=steps_of(spec, model_config, steps),
            timesteps=schedule.timesteps.to(torch.float32).numpy(),
            rows=_realise(spec.canonical, trace),
            init_noise_sigma=float(getattr(schedule.scheduler, "init_noise_sigma", 1.0)),
            noise_draws=trace.draws,
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
    steps = steps_of(spec, model_config, steps)
    if steps < 1:
        raise RequestError("a picture takes at least one step", expected="steps from 1", got=steps)
    scheduler = create(spec, model_config)
    if scheduler.config.get("skip_prk_steps") is False and steps < scheduler.pndm_order:
        raise SamplerError(
            f"{spec.canonical} begins with Runge-Kutta steps, for which diffusers needs more of them",
            expected=f"{scheduler.pndm_order} steps or more",
            got=steps,
            hint='take more steps, or set "skip_prk_steps": true in the model\'s scheduler_config.json',
        )
    if linear_sigmas and spec.lists and scheduler.config.get("use_flow_sigmas"):
        raise RequestError(
            f"FLUX's pipeline leaves a list of sigmas out for {spec.name}, which computes flow sigmas of its own",
            expected="the scheduler without a list, or a flow-matching scheduler such as euler",
            got=spec.canonical,
        )
    with refusals(f"{spec.canonical} with {steps} steps"):
        scheduler.set_timesteps(**_timing(scheduler, spec.lists or steps, tokens, linear_sigmas))
    timesteps: torch.Tensor = scheduler.timesteps
    if len(timesteps) > LONGEST:
        raise RequestError(
            f"{spec.canonical} evaluates the network {len(timesteps)} times in {steps} steps",
            expected=f"at most {LONGEST} evaluations",
            got=len(timesteps),
        )
    start = skip * scheduler.order
    if not 0 <= start < len(timesteps):
        raise RequestError("no step is left of the schedule", expected=f"0 to {steps - 1} steps left out", got=skip)
    # Text to image leaves the first index to the scheduler; only image to image sets it.
    if start and hasattr(scheduler, "set_begin_index"):
        scheduler.set_begin_index(start)
    return Schedule(scheduler, timesteps[start:], step_kwargs(spec, scheduler), start)


def _timing(scheduler: Any, steps: int | dict[str, Any], tokens: int, linear_sigmas: bool) -> dict[str, Any]:
    """Arguments of set_timesteps, as the diffusers pipelines give them. `steps` is their number, or a list by name."""
    config = scheduler.config
    arguments: dict[str, Any] = steps if isinstance(steps, dict) else {"num_inference_steps": steps}
    if linear_sigmas and isinstance(steps, int) and not config.get("use_flow_sigmas"):
        arguments = {"sigmas": np.linspace(1.0, 1 / steps, steps)}
    if config.get("use_dynamic_shifting"):
        few, many = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        # Where the class has no such setting: FLUX's pipeline and SD3's have defaults of their own.
        low, high = config.get("base_shift", 0.5), config.get("max_shift", 1.15 if linear_sigmas else 1.16)
        slope = (high - low) / (many - few)
        arguments = arguments | {"mu": tokens * slope + (low - slope * few)}
    return arguments


class _Trace(NamedTuple):
    """response  of every sample to u [T + 1, 1 + 2T], or to u and the clamped estimates [T + 1, 1 + 3T]
    scales    input scale of each evaluation
    draws     how many noises each evaluation draws
    clamps    evaluation -> what it clamps, as coefficients of the same, and the limit
    """

    response: Float64
    scales: list[float]
    draws: tuple[int, ...]
    clamps: dict[int, tuple[Float64, float]]


def _trace(schedule: Schedule) -> _Trace:
    evaluations = len(schedule.timesteps)
    scales: list[float] = []
    clamps: dict[int, tuple[Float64, float]] = {}

    def one_hot(column: int) -> torch.Tensor:
        basis = torch.zeros(1, 1 + (3 if schedule.clamps else 2) * evaluations, 1, 1, dtype=torch.float64)
        basis[0, column] = 1.0
        return basis

    def model(index: int, sample: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        largest = sample.abs().argmax()
        scales.append(float(model_input.flatten()[largest] / sample.flatten()[largest]))
        return one_hot(1 + index)

    def clamp(index: int, tensor: torch.Tensor, limit: float) -> torch.Tensor:
        if index in clamps:
            raise SamplerError("the scheduler clamps twice in one evaluation", expected="once")
        clamps[index] = tensor.double().flatten().numpy().copy(), limit
        return one_hot(1 + 2 * evaluations + index)

    def noise(index: int) -> torch.Tensor:
        return one_hot(1 + evaluations + index)

    start = one_hot(0)
    samples, draws = drive(schedule, start, noise, model, start.shape, clamp if schedule.clamps else None)
    return _Trace(torch.stack(samples).double().flatten(1).numpy(), scales, draws, clamps)


def _realise(name: str, trace: _Trace) -> NDArray[np.float32]:
    """Rows of the smallest state machine with this response, its first state the sample itself."""
    evaluations = len(trace.scales)
    if not (np.isfinite(trace.response).all() and np.isfinite(trace.scales).all()):
        raise SamplerError(
            f"{name} divides by zero for this model",
            expected="finite coefficients",
            hint="take fewer steps; a noise schedule that ends at zero signal needs a model trained for v_prediction",
        )
    rows = np.zeros((evaluations, Layout(MOST_STATES, clamps=True).width))
    a, b, c, scale = split(rows)
    clamp = split_clamp(rows)
    assert clamp is not None
    scale[:] = trace.scales
    most = 1
    basis = _basis(name, trace.response, evaluations, 0)
    for i in range(evaluations):
        following = _basis(name, trace.response, evaluations, i + 1)
        d, e = len(basis), len(following)
        # The old basis is orthogonal and zero outside what is past, so projecting on it solves the least squares.
        a[i, :e, :d] = following @ basis.T / np.square(basis).sum(axis=1)
        b[i, :e] = following[:, 1 + i]
        c[i, :e] = following[:, 1 + evaluations + i]
        if i in trace.clamps:
            clamp[0][i], clamp[1][i], clamp[2][i] = _clamped(name, trace, i)
            clamp[3][i, :e] = following[:, 1 + 2 * evaluations + i]
        basis, most = following, max(most, e)
    layout = Layout(max(most, PLAIN.states), clamps=bool(trace.clamps))
    return _narrowed(rows, layout)


def _narrowed(rows: Float64, layout: Layout) -> NDArray[np.float32]:
    """The rows in `layout`, which has room for all of them that is not zero."""
    narrow, n = np.zeros((len(rows), layout.width), np.float32), layout.states
    (a, b, c, scale), (wide_a, wide_b, wide_c, wide_scale) = split(narrow), split(rows)
    a[:], b[:], c[:], scale[:] = wide_a[:, :n, :n], wide_b[:, :n], wide_c[:, :n], wide_scale
    clamp, wide_clamp = split_clamp(narrow), split_clamp(rows)
    if clamp is not None and wide_clamp is not None:
        for i in range(3):
            clamp[i][:] = wide_clamp[i]
        clamp[3][:] = wide_clamp[3][:, :n]
    return narrow


def _clamped(name: str, trace: _Trace, i: int) -> tuple[float, float, float]:
    """u, v and limit of what evaluation i clamps: u times the sample and v times the network's output."""
    estimate, limit = trace.clamps[i]
    sample = trace.response[i]
    v = float(estimate[1 + i])
    u = float(estimate @ sample / (sample @ sample))  # the sample holds nothing of this output
    rest = estimate - u * sample
    rest[1 + i] -= v
    if np.abs(rest).max() > RANK_TOLERANCE * np.abs(estimate).max():
        raise SamplerError(f"{name} clamps what comes from more than its sample and this evaluation")
    return u, v, limit


def _basis(name: str, response: Float64, evaluations: int, i: int) -> Float64:
    """What the samples from x_i on know of the past, [D, 1 + 2T or 1 + 3T]: x_i, then orthogonal directions, largest
    first."""
    past = response[i : i + WINDOW].copy()
    for first in range(1, past.shape[1], evaluations):
        past[:, first + i : first + evaluations] = 0.0
    sample = past[0]
    if i == evaluations:
        return past[:1]  # nothing comes after it, and it may be zero: IPNDM's after one step
    if not sample.any():
        raise SamplerError(
            f"{name} multiplies its sample by zero", where=f"before evaluation {i}", hint="take more steps"
        )
    rest = past - np.outer(past @ sample / (sample @ sample), sample)
    _, weights, directions = np.linalg.svd(rest, full_matrices=False)
    rank = int((weights > RANK_TOLERANCE * np.linalg.norm(past)).sum())
    if 1 + rank > MOST_STATES:
        raise SamplerError(
            f"{name} is not a linear state machine with at most {MOST_STATES} states",
            expected=f"at most {MOST_STATES} states",
            got=f"{1 + rank} states before evaluation {i}",
            hint="name another scheduler, such as euler or dpm++2m",
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
