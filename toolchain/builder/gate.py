"""The gate: the bundle of a quantised recipe is checked before it is put into its place.

The check itself is given by whoever builds, as it is made of what lies below this room. Its result is an artifact of
the stage "gate": the same engines under the same limits are not checked again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from toolchain.builder.plan import Plan, unquantized_denoiser
from toolchain.builder.steps import Within
from toolchain.bundle.bundle import Bundle, EngineEntry
from toolchain.errors import DiffbuildError, GateError
from toolchain.models.source import ModelSource
from toolchain.store.artifacts import Artifact
from toolchain.store.links import link_file
from toolchain.store.plain_json import encode

RESULT = "gate.json"
DENOISER = "denoiser"
Gate = Callable[[Bundle, ModelSource, Bundle | None, Within], Mapping[str, Any]]
"""Called with a bundle, its model, its denoiser without quantisation where that is at hand, and a callback for
progress. Returns the result as JSON, of which `state`, `verdict` and `worst` are read here: see `check.gate`."""


def rejected(output: Path) -> Path:
    """Where a bundle is left that misses its limits: beside its place."""
    return output.with_name(f"{output.name}.rejected")


def pass_gate(plan: Plan, bundle: Bundle, output: Path, gate: Gate, within: Within) -> tuple[Artifact, bool]:
    """The artifact of the gate, and whether the bundle was checked for it now.

    GateError, and no artifact, for a bundle that misses its limits and will not be put at `output`.
    """
    step = plan.gate
    assert step is not None

    def fill(folder: Path) -> None:
        scratch = folder / "unquantized"
        scratch.mkdir()
        new = replace(bundle, vouched=True)  # it was written a moment ago
        with _named():
            result = gate(new, plan.source, unquantized(plan, new, scratch), within)
        shutil.rmtree(scratch)
        if result["state"] != "passed":
            aside = rejected(output)
            raise GateError(
                f"gate: the bundle misses the limits of recipe {plan.recipe.name}, and is not put at {output}",
                result,
                where=aside,
                got="\n    ".join([f"{result['verdict']}; the worst:", *result["worst"]]),
                hint=f"diffbuild check {aside} --model {plan.source.name} --html check.html shows where; "
                "build with --no-gate to have it all the same",
            )
        (folder / RESULT).write_text(encode(result) + "\n")

    return plan.store.get_or_build(step.stage, step.subject, step.inputs, fill)


@contextmanager
def _named() -> Iterator[None]:
    """An error of the check tells that it is none of the build, and what builds all the same."""
    try:
        yield
    except DiffbuildError as error:
        hint = error.hint or "build with --no-gate to have the bundle unchecked"
        kind = type(error)
        raise kind(
            f"gate: {error.what}", where=error.where, expected=error.expected, got=error.got, hint=hint
        ) from error


def result_of(artifact: Artifact) -> dict[str, Any]:
    """What the gate said."""
    result: dict[str, Any] = json.loads(artifact.file(RESULT).read_text())
    return result


def unquantized(plan: Plan, bundle: Bundle, scratch: Path) -> Bundle | None:
    """The bundle's denoiser as it is without quantisation, from the store; None where that lacks it.

    Weight files are linked into `scratch`, a folder of the store: engines want theirs in one folder.
    """
    bucket = bundle.buckets[0]
    steps = {step.stage: step for step in unquantized_denoiser(plan)}
    artifacts = {stage: plan.store.lookup(stage, step.key) for stage, step in steps.items()}
    roles = [role for role in ("weights", "packed") if role in artifacts and plan.backend.reads_weights(plan.options)]
    weights: dict[str, str] = {}
    for role in roles:
        if (artifact := artifacts[role]) is None:
            return None
        (weights[role],) = artifact.files
        link_file(artifact.file(weights[role]), scratch / weights[role])
    if (engine := artifacts["engine"]) is None:
        return None
    # The engine's path is absolute, and stays so where it is joined to the bundle's.
    entry = EngineEntry(str(engine.path), weights, bundle.engine(DENOISER, bucket).spec)
    engines = {DENOISER: {str(bucket): entry}}
    return replace(bundle, path=scratch, recipe=plan.recipe.unquantized, engines=engines, files={})
