"""Stage "sampler": a scheduler of diffusers -> coefficient tables, one for each schedule that a recipe names."""

from __future__ import annotations

import itertools
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.errors import RequestError, SamplerError
from toolchain.sampler.table import skipped_steps, spans, table_name

log = logging.getLogger("toolchain")

TABLES = "tables.json"


@dataclass(frozen=True)
class Schedule:
    """One table: `steps` of which image to image skips `skip`, for latents of `tokens` tokens.

    required: whether failing to compile this table fails the build; otherwise it is left out with a warning.
    """

    steps: int
    tokens: int
    skip: int
    required: bool


def schedules_of(
    spec: str,
    counts: Mapping[int, bool],
    sizes: Sequence[int],
    strengths: Sequence[float],
    *,
    early_start: bool,
) -> dict[str, Schedule]:
    """Every schedule of a scheduler, by the name of its table.

    counts       numbers of steps, each with whether it is required
    sizes        of latents, in tokens
    strengths    of image to image, as far as a step is left of them
    early_start  as in ModelSettings
    """
    schedules = {}
    for steps in sorted(counts):
        skips = dict.fromkeys([0, *(skipped_steps(steps, strength, early_start=early_start) for strength in strengths)])
        for tokens, skip in itertools.product(sizes, skips):
            if skip < steps:  # a strength may be too small for the shortest schedules
                name = table_name(spec, steps, tokens=tokens, skip=skip)
                schedules[name] = Schedule(steps, tokens, skip, required=counts[steps])
    return schedules


def write(
    spec: str,
    config: Mapping[str, Any],
    schedules: Mapping[str, Schedule],
    folder: Path,
    *,
    linear_sigmas: bool,
    progress: Callable[[str, float | None], None],
) -> None:
    """The tables of `schedules`, by their names. Raises RequestError and SamplerError."""
    from toolchain.sampler.compile import compile_table

    tables: dict[str, Any] = {}
    omitted: dict[int, str] = {}
    for number, (name, schedule) in enumerate(schedules.items()):
        progress(f"table {number + 1} of {len(schedules)}", number / len(schedules))
        try:
            table = compile_table(
                spec,
                schedule.steps,
                config,
                skip=schedule.skip,
                tokens=schedule.tokens,
                linear_sigmas=linear_sigmas,
            )
            tables[name] = table.to_json()
        except (RequestError, SamplerError) as error:
            if schedule.required:
                raise
            reason = error.what if error.got is None else f"{error.what}: {error.got}"
            tables[name] = omitted[schedule.steps] = reason
    if omitted:
        reasons = "; ".join(dict.fromkeys(omitted.values()))
        log.warning("no tables of %s for %s steps: %s", spec, spans(omitted), reasons)
    (folder / TABLES).write_text(json.dumps(tables, separators=(",", ":")))
