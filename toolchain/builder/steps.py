"""Steps of a build, each with the key of the artifact that it writes.

A key is the hash of what goes into the artifact: the code of its stage, the keys of the steps before it, its slice of
the recipe, the model's files, the versions that matter and, for engines, the device and the bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

from toolchain.builder.closures import CLOSURES
from toolchain.store.artifacts import Artifact, Json
from toolchain.store.manifest import Change

Stage = Literal[
    "tokenizer", "sampler", "graph", "weights", "packed", "merged", "engine", "watched", "calibration", "gate"
]
CALIBRATION = "calibration"
"""The label of tables that a calibration draws with, and no bundle holds."""
RENAMED = "recipe.name"
"""The changed field of a step that was compared with a recipe of another name."""
EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
CHECK_TOOLS = ("torch", "diffusers", "transformers", "numpy", "polygraphy", "scikit-image")


@dataclass(frozen=True)
class StepId:
    """Names a step within a plan.

    stage      what kind of artifact
    component  whose: a component of the family; for a tokenizer its folder, for tables their scheduler
    label      the bucket, as in `bundle`; empty if one artifact serves all buckets
    """

    stage: Stage
    component: str
    label: str = ""

    def __str__(self) -> str:
        return f"{self.stage} {self.subject()}"

    def subject(self, recipe: str | None = None) -> str:
        """What the artifact is of, as the store and `plan` write it."""
        return " ".join(part for part in (recipe, self.component, self.label) if part)


Built = Mapping[StepId, Artifact]
Within = Callable[[str, float | None], None]
"""How far one step is: the name of its phase and how much of that is done, 0 to 1."""
Run = Callable[[Built, Path, Within], None]
"""Writes an artifact: called with the artifacts built before, the folder to fill, and a callback for progress."""


@dataclass(frozen=True)
class Step:
    """One artifact that a plan needs.

    recipe   its name, which the store's subject begins with
    changed  for a miss, the fields that differ from the last artifact of the same subject; empty when there was none
    run      None for the gate, which runs on the whole bundle: see `builder.gate`
    needs    the steps whose artifacts `run` reads
    """

    id: StepId
    recipe: str
    key: str
    inputs: Mapping[str, Json]
    hit: bool
    changed: tuple[Change, ...]
    run: Run | None = field(repr=False)
    needs: tuple[StepId, ...] = ()

    @property
    def stage(self) -> Stage:
        """What kind of artifact it writes."""
        return self.id.stage

    @property
    def subject(self) -> str:
        """The artifact's subject in the store."""
        return self.id.subject(self.recipe)

    @property
    def reasons(self) -> tuple[str, ...]:
        """The changes as lines, "path.to.field: old -> new"."""
        return tuple(map(str, self.changed))

    @property
    def name(self) -> str:
        """The artifact's name in a bundle's manifest."""
        return f"{self.stage} {self.subject}"


def recipe_of(artifact: Artifact, component: str) -> str:
    """The name of the recipe that an artifact of a component was built for: the inverse of `Step.subject`."""
    return artifact.subject.rpartition(f" {component}")[0]


def tool_versions(names: Sequence[str]) -> dict[str, Json]:
    """Installed versions of packages, "missing" for one that is not installed."""
    versions: dict[str, Json] = {}
    for name in names:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "missing"
    return versions


@cache
def code_digest(*entries: str) -> str:
    """Digest of the source files that decide an outcome: a version number that raises itself.

    entries: the modules that are called, as in `CLOSURES`; what they import comes with them.
    """
    return digest_of_modules(module for entry in entries for module in CLOSURES[entry])


def digest_of_modules(modules: Iterable[str]) -> str:
    """Digest of the source of modules of this package, each named by its dotted path below `toolchain`."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for module in sorted(set(modules)):
        path = root / (module.replace(".", "/"))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        digest.update(module.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
