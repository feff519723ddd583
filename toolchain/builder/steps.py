"""Steps of a build, each with the key of the artifact that it makes.

A key is the hash of what goes into the artifact: the code of its stage, the keys of the steps before it, its slice of
the recipe, the model's files, the versions that matter and, for engines, the device and the bucket.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from toolchain.store.artifacts import Artifact, Json

EXPORT_TOOLS = ("torch", "diffusers", "transformers", "onnx", "onnx-ir", "onnxscript")
ENGINE_CODE = ("engines", "cuda", "graph", "weights")
CODE = {  # which packages of ours decide a stage's outcome
    "graph": ("models", "export", "graph", "sampler/table.py"),
    "merged": ("graph",),
    "weights": ("models", "export", "engines", "graph", "weights"),  # a backend wants some of them turned
    "packed": ENGINE_CODE,
    "engine": ENGINE_CODE,
    "sampler": ("sampler",),
    "tokenizer": ("models/tokenizers.py",),
    "model": ("models/single_file.py",),
}

Built = Mapping[str, Artifact]
Within = Callable[[str, float | None], None]
"""How far one step is: the name of its phase and how much of that is done, 0 to 1."""


@dataclass(frozen=True)
class Step:
    """One artifact to have. `name` is "stage subject"; `run` gets the artifacts built before it, a folder to fill and
    whom to tell how far it is.

    changed: for a miss, the fields that differ from the last artifact of the same name; empty when there was none.
    needs: names of the steps whose artifacts `run` reads.
    """

    stage: str
    subject: str
    key: str
    inputs: Mapping[str, Json]
    hit: bool
    changed: tuple[str, ...]
    run: Callable[[Built, Path, Within], None]
    needs: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.stage} {self.subject}"


def tool_versions(names: Sequence[str]) -> dict[str, Json]:
    found: dict[str, Json] = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "missing"
    return found


@cache
def code_digest(stage: str) -> str:
    """Digest of the source files that decide a stage's outcome: a version number that nobody can forget to raise."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for place in CODE[stage]:
        path = root / place
        for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
            digest.update(file.relative_to(root).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
