"""Measurements that outlive an interruption: small JSON documents and pictures in the store, found by what went in."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toolchain.builder.steps import digest_of_modules
from toolchain.store.artifacts import Artifact, Json, Store
from toolchain.store.plain_json import encode

STAGE = "tune"
RESULT = "result.json"
CODE = (
    *("check.feeds", "check.measure", "check.pictures", "check.report"),
    *("precision.activations", "precision.changes", "precision.ranges", "precision.rounding", "precision.stored"),
    *("tune.inputs", "tune.kept", "tune.limits", "tune.pictures", "tune.references", "tune.simulation"),
)
"""What decides a number beside the inputs of its measurement."""


class Kept:
    """The measurements of one tuning; `subject` is the name of its recipe."""

    def __init__(self, store: Store, subject: str) -> None:
        self.store, self.subject = store, subject
        self._code = digest_of_modules(CODE)

    def number(self, what: str, inputs: Mapping[str, Json], measure: Callable[[], float]) -> float:
        """A number that is measured once for these inputs."""
        return float(self.document(what, inputs, lambda folder: {"value": measure()})["value"])

    def document(
        self, what: str, inputs: Mapping[str, Json], measure: Callable[[Path], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """What `measure` returns, once for these inputs; it may write files into the folder that it is called with."""
        document: dict[str, Any] = json.loads(self.artifact(what, inputs, measure).file(RESULT).read_text())
        return document

    def artifact(self, what: str, inputs: Mapping[str, Json], measure: Callable[[Path], Mapping[str, Any]]) -> Artifact:
        """The artifact of a document."""

        def build(folder: Path) -> None:
            (folder / RESULT).write_text(encode(measure(folder)))

        given: dict[str, Json] = {"measured": what, "code": self._code, **inputs}
        return self.store.get_or_build(STAGE, f"{self.subject} {what}", given, build)[0]
