"""The gate of a build: what a check of the new bundle says, and whether fewer bits made its steps faster, as JSON."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any

from toolchain.bundle.bundle import Bundle
from toolchain.check.compare import PACKAGES, compare
from toolchain.check.report import CheckReport, Entry
from toolchain.check.step_time import compare_step_times
from toolchain.errors import DiffbuildError
from toolchain.models.registry import family_of
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe
from toolchain.store.plain_json import plain
from toolchain.weights.safetensors import read_folder

FLOAT32_BYTES = 4


def require_possible(source: ModelSource, recipe: Recipe) -> None:
    """DiffbuildError where a gate would find a package missing, or the machine too small for the reference.

    Imports none of the packages and reads no weights, so that a build can ask before it begins.
    """
    _require_installed()
    folders = {component.folder for component in family_of(source, recipe).parts(recipe)}
    numbers = sum(math.prod(ref.shape) for folder in folders for ref in read_folder(source.path / folder).values())
    has = physical_memory()
    if has is not None and has < FLOAT32_BYTES * numbers:
        raise DiffbuildError(
            "a quantised recipe is checked when it is built, and the reference does not fit into this machine",
            expected=f"{FLOAT32_BYTES * numbers / 1e9:.0f} GB of memory for {source.name} in float32",
            got=f"{has / 1e9:.0f} GB",
            hint="build with --no-gate, and run diffbuild check on a larger machine",
        )


def physical_memory() -> int | None:
    """Bytes of this machine's memory; None where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None  # Windows has no sysconf


def _require_installed() -> None:
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        raise DiffbuildError(
            "a quantised recipe is checked when it is built, and that needs more packages",
            got=f"{', '.join(missing)} not installed",
            hint="pip install 'diffbuild[build]', or build with --no-gate",
        )


def check_gate(
    bundle: Bundle, source: ModelSource, unquantized: Bundle | None, within: Callable[[str, float | None], None]
) -> Mapping[str, Any]:
    """Compares a bundle with its model, by the recipe's limits, and its steps with those of `unquantized`.

    `state` is "passed" or "failed", `verdict` and `worst` are for people: the worst component and the worst picture.
    Raises what `compare` raises.
    """
    began = time.perf_counter()
    report = compare(bundle, source, progress=lambda text: within(text, None))
    within("times of a step", None)
    times = compare_step_times(bundle, unquantized)
    return summary(report, bundle) | {"step_time": times, "seconds": round(time.perf_counter() - began, 1)}


def summary(report: CheckReport, bundle: Bundle) -> dict[str, Any]:
    """What of a report goes into the bundle."""
    prompts = bundle.recipe.check.prompts
    components, pictures = report.worst_first()[:1], report.worst_pictures_first()[:1]
    worst = [_line(entry, prompts) for entry in components if report.passed or not entry.passed]
    worst += [p.describe(report.limits) for p in pictures if report.passed or not p.passed]
    data = report.to_json()
    return {
        "state": "passed" if report.passed else "failed",
        "verdict": report.verdict(),
        "worst": worst,
        "worst_component": data["worst"],
        "worst_picture": pictures[0].to_json() if pictures else None,
        "pictures": data["summary"],
        "limits": plain(report.limits),
        "steps": report.steps_json(),
        "versions": data["versions"],
    }


def _line(entry: Entry, prompts: tuple[str, ...]) -> str:
    """An entry, with the texts of the prompts that its input is named after."""
    named = re.match(r"prompts? (\d+)(?:-(\d+))?", entry.input)
    texts = prompts[int(named[1]) - 1 : int(named[2] or named[1])] if named else ()
    quoted = f" ({', '.join(map(repr, texts))})" if texts else ""
    return f"{entry.component} {entry.bucket}, {entry.input}{quoted}, {entry.output}: {entry.numbers()}"
