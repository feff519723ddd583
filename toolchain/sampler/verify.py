"""Verifies a table against the scheduler that it was compiled from, on a nonlinear test model with the same noises."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from toolchain.errors import SamplerError
from toolchain.sampler.table import SamplerTable, split, step_reference
from toolchain.sampler.trajectory import Schedule, drive

TOLERANCE = 1e-5  # of `Errors.exact`; 1.6e-6 after 200 evaluations was the most seen
FLOAT32_TOLERANCE = 1e-2  # of `Errors.float32`: only shows that float64 did not run another algorithm

Float64 = NDArray[np.float64]


class Errors(NamedTuple):
    """Largest differences at the end of a trajectory, relative to its largest value there. Where the scheduler clamps,
    relative to the largest value at the start if that is more: what is left within the limits is a difference of such.

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
    by_table = _by_table(table, sample, noises)

    floor = float(sample.abs().max()) if table.layout.clamps else 0.0

    def difference(dtype: torch.dtype) -> float:
        expected = _by_scheduler(table, make(), sample.to(dtype), noises.to(dtype))
        largest, off = max(float(np.abs(expected).max()), floor), float(np.abs(by_table - expected).max())
        return off / largest if off else 0.0

    return Errors(exact=difference(torch.float64), float32=difference(torch.float32))


def _test_model(model_input: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A network that is nonlinear in the sample and sensitive to a timestep that is off by one."""
    return torch.tanh(0.3 * model_input + 0.5 * torch.sin(timestep.to(torch.float32)))


def _by_table(table: SamplerTable, sample: torch.Tensor, noises: torch.Tensor) -> Float64:
    state = np.zeros((table.layout.states, *sample.shape), np.float32)
    state[0] = sample.numpy()
    scales = split(table.rows)[3]
    for row, scale, timestep, noise in zip(table.rows, scales, torch.from_numpy(table.timesteps), noises, strict=False):
        output = _test_model(torch.from_numpy(scale * state[0]), timestep)
        state = step_reference(row, state, output.numpy(), noise.numpy())
    return np.asarray(state[0], np.float64)


def _by_scheduler(table: SamplerTable, schedule: Schedule, sample: torch.Tensor, noises: torch.Tensor) -> Float64:
    def model(index: int, _: torch.Tensor, model_input: torch.Tensor) -> torch.Tensor:
        return _test_model(model_input, schedule.timesteps[index])

    samples, draws = drive(schedule, sample, lambda index: noises[index], model, sample.shape)
    if draws != table.noise_draws:
        raise SamplerError(
            f"the table of {table.name} draws other noises than its scheduler", expected=draws, got=table.noise_draws
        )
    return np.asarray(samples[-1].double().numpy())


def verify_table(table: SamplerTable, make: Callable[[], Schedule]) -> Errors:
    """Returns `table_errors`. SamplerError where they exceed TOLERANCE or FLOAT32_TOLERANCE."""
    errors = table_errors(table, make)
    if not (errors.exact <= TOLERANCE and errors.float32 <= FLOAT32_TOLERANCE):  # written so that NaN fails
        raise SamplerError(
            f"{table.name} is not a linear state machine with at most {table.layout.states} states",
            expected=f"the scheduler's own result to {TOLERANCE:.0e}, and to {FLOAT32_TOLERANCE:.0e} in float32",
            got=f"{errors.exact:.1e} and {errors.float32:.1e} after {table.evaluations} evaluations",
            hint="name another scheduler, such as euler or dpm++2m",
        )
    return errors
