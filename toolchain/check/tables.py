"""Every sampler table of a bundle against the diffusers scheduler that it stands for.

A table's hidden states are a matter of choice, so two right tables may differ: what is compared is what they do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from toolchain.bundle import ANY
from toolchain.check.report import Entry, Metrics
from toolchain.errors import SamplerError
from toolchain.runtime.pipeline import Pipeline
from toolchain.sampler.compile import prepare
from toolchain.sampler.schedulers import parse
from toolchain.sampler.table import parse_table_name
from toolchain.sampler.trajectory import Schedule
from toolchain.sampler.verify import TOLERANCE, table_errors


def compare_tables(pipeline: Pipeline, config: Mapping[str, Any]) -> list[Entry]:
    """One entry per table: table and scheduler drive the same nonlinear test model with the same noises.

    The scheduler is made from `config`, the model's own. SamplerError when diffusers cannot make it.
    """
    entries = []
    for label in sorted(pipeline.bundle.samplers):
        error = _error(pipeline, label, config)
        failed = () if error <= TOLERANCE else ("max_error",)  # written so that NaN fails
        metrics, limits = Metrics(max_error=error), Metrics(max_error=TOLERANCE)
        entries.append(Entry("sampler", ANY, label, "trajectory", metrics, limits, failed))
    return entries


def _error(pipeline: Pipeline, label: str, config: Mapping[str, Any]) -> float:
    """Largest difference at the end relative to the largest value; infinite where they take other steps or draws."""
    table = pipeline.load_table(label)
    name, steps, tokens, skip = parse_table_name(label)
    linear = pipeline.bundle.settings.linear_sigmas
    spec = parse(name)

    def make() -> Schedule:
        return prepare(spec, steps, config, skip=skip, tokens=tokens, linear_sigmas=linear)

    schedule = make()
    if len(schedule.timesteps) != table.evaluations:
        return math.inf
    sigma = float(getattr(schedule.scheduler, "init_noise_sigma", 1.0))
    try:
        errors = table_errors(table, make)
    except SamplerError:
        return math.inf  # it draws noise at other evaluations
    return max(errors.exact, abs(table.init_noise_sigma / sigma - 1))
