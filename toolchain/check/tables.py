"""Every sampler table of a bundle against the diffusers scheduler that it stands for.

A table's hidden states are a matter of choice, so two right tables may differ: what is compared is what they do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.check.report import Entry, Metrics
from toolchain.errors import SamplerError
from toolchain.runtime.tables import load_table
from toolchain.sampler.compile import prepare
from toolchain.sampler.schedulers import parse
from toolchain.sampler.table import SamplerTable, describe_tables, parse_table_name
from toolchain.sampler.trajectory import Schedule
from toolchain.sampler.verify import TOLERANCE, table_errors


def compare_tables(bundle: Bundle, config: Mapping[str, Any]) -> list[Entry]:
    """Entries for the tables of each scheduler: one for all that are right, with the largest error, and one for each
    that is not. Table and scheduler drive the same nonlinear test model with the same noises.

    The scheduler is made from `config`, the model's own. SamplerError when diffusers cannot make it.
    """
    entries = []
    limits = Metrics(max_error=TOLERANCE)
    schedulers: dict[str, dict[str, float]] = {}
    for label in bundle.samplers:
        try:
            table = load_table(bundle, label)
        except SamplerError:
            continue  # left out of a range of steps
        schedulers.setdefault(parse_table_name(label)[0], {})[label] = _error(bundle, label, table, config)
    for _, errors in sorted(schedulers.items()):
        right = {label: error for label, error in errors.items() if error <= TOLERANCE}
        if right:
            label, most = ", ".join(describe_tables(right)), max(right.values())
            entries.append(Entry("sampler", ANY, label, "trajectory", Metrics(max_error=most), limits, ()))
        for label in sorted(errors.keys() - right.keys()):  # written so that NaN fails
            wrong = Metrics(max_error=errors[label])
            entries.append(Entry("sampler", ANY, label, "trajectory", wrong, limits, ("max_error",)))
    return entries


def _error(bundle: Bundle, label: str, table: SamplerTable, config: Mapping[str, Any]) -> float:
    """Largest difference at the end relative to the largest value; infinite where they take other steps or draws."""
    name, steps, tokens, skip = parse_table_name(label)
    linear = bundle.settings.linear_sigmas
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
