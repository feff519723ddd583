"""A bundle: a folder with `bundle.json` that a runtime can load after it was moved or copied, without the model.

Every file is listed with its size and sha256, and verified before any of it reaches an engine's loader. A flipped bit
in a weight passes every loader silently, so the digests are ours to check. The manifest carries its own as well: a
flipped bit in it may be a guidance, a step count or a name in valid JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from toolchain.errors import BundleError, RecipeError
from toolchain.recipe import Bucket, Recipe
from toolchain.settings import ModelSettings
from toolchain.signature import GraphSpec
from toolchain.store.files import file_digest

FORMAT = 4
MANIFEST = "bundle.json"
SIGNATURE = "bundle.sig"
"""The signature of the manifest, in a signed bundle: see `toolchain.bundle.signing`."""
MACHINE_CODE = frozenset({"tensorrt", "tensorrt_rtx"})
"""Backends whose engines are executable code, on whatever they run."""
AGAIN = "build the bundle again, or copy it again from where it was built"
ANY = "any"
"""Stands for the bucket of a component that is the same for all of them."""
PROFILES = "profiles"
"""Stands for all buckets of a component whose engine has an optimization profile for each."""


@dataclass(frozen=True)
class EngineEntry:
    """One engine: its folder, its component's weight files by role, and its signature. Paths are in the bundle."""

    folder: str
    weights: Mapping[str, str]
    spec: GraphSpec


@dataclass(frozen=True)
class FileEntry:
    sha256: str
    size: int


@dataclass(frozen=True)
class Bundle:
    """What `bundle.json` says.

    engines    component -> bucket (or "any") -> engine
    samplers   "spec/steps" -> file
    model      name, revision, pipeline class and the digests of the weights it was built from
    tokenizers text encoder -> folder
    artifacts  "stage subject" -> key of every artifact that it consists of
    tools      versions of the packages that built it
    gate       of a quantised recipe, what the check of the build said, or why there was none; else None
    digest     sha256 of the manifest that was read
    vouched    whether its signature or origin was checked, as engines of machine code require: see `bundle.signing`
    """

    path: Path
    model: Mapping[str, Any]
    family: str
    settings: ModelSettings
    recipe: Recipe
    backend: str
    device: Mapping[str, Any]
    engines: Mapping[str, Mapping[str, EngineEntry]]
    samplers: Mapping[str, str]
    tokenizers: Mapping[str, str]
    files: Mapping[str, FileEntry]
    artifacts: Mapping[str, str]
    tools: Mapping[str, str]
    gate: Mapping[str, Any] | None = None
    digest: str = ""
    vouched: bool = False

    def __repr__(self) -> str:
        what = f"{self.recipe.name} ({self.family}, {self.backend}): {describe_buckets(self.buckets)}"
        return f"<Bundle {what}; {self.path}>"

    @property
    def buckets(self) -> list[Bucket]:
        """The buckets that were built, in the recipe's order; the first is the default."""
        return [b for b in self.recipe.buckets if str(b) in self.engines["denoiser"]]

    @property
    def machine_code(self) -> bool:
        """Whether its engines are executable code, so that opening one runs it. What OpenVINO exports for a CPU is a
        graph, and what it exports for other devices may hold their kernels."""
        return self.backend in MACHINE_CODE or (self.backend == "openvino" and self.recipe.openvino.device != "CPU")

    @property
    def default_guidance(self) -> float:
        """The recipe's guidance where the bundle uses one (a second pass, or an input of the network), else 1."""
        used = self.recipe.classifier_free_guidance or self.settings.embedded_guidance
        return self.recipe.sampling.guidance if used else 1.0

    def engine(self, component: str, bucket: Bucket) -> EngineEntry:
        """The engine of a component for a bucket. BundleError when there is none."""
        entries = self.engines.get(component, {})
        entry = entries.get(ANY) or entries.get(str(bucket))
        if entry is None:
            name = f"{component} {bucket}"
            raise BundleError("the bundle has no such engine", where=self.path / MANIFEST, got=name, hint=AGAIN)
        return entry

    def to_json(self) -> dict[str, Any]:
        """The manifest as plain data, without its digest."""
        return {
            "format": FORMAT,
            "model": dict(self.model),
            "family": self.family,
            "settings": self.settings.to_json(),
            "recipe": self.recipe.to_json(),
            "backend": self.backend,
            "device": dict(self.device),
            "engines": {
                component: {
                    b: {"folder": e.folder, "weights": dict(e.weights), "spec": e.spec.to_json()} for b, e in by.items()
                }
                for component, by in self.engines.items()
            },
            "samplers": dict(self.samplers),
            "tokenizers": dict(self.tokenizers),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
            "artifacts": dict(self.artifacts),
            "tools": dict(self.tools),
            "gate": None if self.gate is None else dict(self.gate),
        }

    def verify(self) -> None:
        """Compares every listed file with its size and sha256. BundleError for the first one that differs."""
        for problem in self.problems():
            raise problem

    def verify_engines(self) -> None:
        """`verify` for the files in the engines' folders alone."""
        folders = tuple(f"{PurePosixPath(e.folder)}/" for by in self.engines.values() for e in by.values())
        for problem in self.problems({name for name in self.files if name.startswith(folders)}):
            raise problem

    def problems(self, names: Collection[str] | None = None) -> Iterator[BundleError]:
        """One BundleError for each file that is missing or changed, largest file first.

        names: the files to verify; None verifies all of them.
        """
        chosen = [item for item in self.files.items() if names is None or item[0] in names]
        jobs = sorted(chosen, key=lambda item: -item[1].size)
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:  # hashing releases the interpreter lock
            for problem in pool.map(lambda job: self._problem(*job), jobs):
                if problem:
                    yield problem

    def _problem(self, name: str, entry: FileEntry) -> BundleError | None:
        path = self.path / name
        if self._leads_away(path) or not path.is_file():
            return BundleError("a file of the bundle is missing", where=path, expected="a regular file", hint=AGAIN)
        size = path.stat().st_size
        if size != entry.size:
            return BundleError(
                "a file of the bundle was changed",
                where=path,
                expected=f"{entry.size} bytes",
                got=f"{size} bytes",
                hint=AGAIN,
            )
        digest = file_digest(path)
        if digest != entry.sha256:
            return BundleError(
                "a file of the bundle was changed",
                where=path,
                expected=f"sha256 {entry.sha256}",
                got=digest,
                hint=AGAIN,
            )
        return None

    def _leads_away(self, path: Path) -> bool:
        """Whether a file is a link, other than one of a hub's snapshot into the same repository."""
        if not path.is_symlink():
            return False
        repository = _hub_repository(self.path.resolve())
        return repository is None or not path.resolve().is_relative_to(repository)


def encode(manifest: Mapping[str, Any]) -> bytes:
    """The text of `bundle.json`: the manifest in the given order, and its own sha256."""
    digest = hashlib.sha256(json.dumps(manifest).encode()).hexdigest()
    return (json.dumps({**manifest, "digest": digest}, indent=1) + "\n").encode()


def read_bundle(path: str | Path) -> Bundle:
    """Reads and checks `bundle.json`, and which files lie beside it; reads no other file. Raises BundleError."""
    path = Path(path)
    manifest = path / MANIFEST
    try:
        text = manifest.read_bytes()
        data = json.loads(text)
    except FileNotFoundError:
        got = "no such folder" if not path.exists() else f"no {MANIFEST} in it"
        raise BundleError(
            "not a bundle", where=path, got=got, hint="diffbuild build RECIPE --model MODEL --output " + str(path)
        ) from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{MANIFEST} cannot be read", where=manifest, got=error, hint=AGAIN) from error
    if not isinstance(data, dict) or not isinstance(data.get("format"), int):
        raise BundleError(f"{MANIFEST} is not a bundle's manifest", where=manifest, hint=AGAIN)
    if data["format"] != FORMAT:
        newer = data["format"] > FORMAT
        raise BundleError(
            f"the bundle has {'a newer' if newer else 'an older'} format",
            where=manifest,
            expected=f"format {FORMAT}",
            got=f"format {data['format']}",
            hint="update diffbuild" if newer else "build the bundle again",
        )
    data.pop("digest", None)
    # Byte for byte, so that no edit at all passes, not even of white space.
    if encode(data) != text:
        raise BundleError(
            f"{MANIFEST} was changed", where=manifest, expected="what was written, with its digest", hint=AGAIN
        )
    try:
        bundle = replace(_structure(path, data), digest=hashlib.sha256(text).hexdigest())
    except (KeyError, TypeError, ValueError, AttributeError, RecipeError) as error:
        raise BundleError(
            f"{MANIFEST} is damaged", where=manifest, got=f"{type(error).__name__}: {error}", hint=AGAIN
        ) from error
    _check_paths(bundle)
    return bundle


def _structure(path: Path, data: dict[str, Any]) -> Bundle:
    engines = {
        component: {
            b: EngineEntry(str(e["folder"]), _texts(e["weights"]), GraphSpec.from_json(e["spec"]))
            for b, e in by.items()
        }
        for component, by in data["engines"].items()
    }
    files = {name: FileEntry(str(f["sha256"]), int(f["size"])) for name, f in data["files"].items()}
    recipe = Recipe.from_json(data["recipe"])
    _check_engines(engines, recipe)
    return Bundle(
        path=path,
        model=data["model"],
        family=data["family"],
        settings=ModelSettings.from_json(data["settings"]),
        recipe=recipe,
        backend=data["backend"],
        device=data["device"],
        engines=engines,
        samplers=_texts(data["samplers"]),
        tokenizers=_texts(data["tokenizers"]),
        files=files,
        artifacts=data["artifacts"],
        tools=data["tools"],
        gate=data.get("gate"),
    )


def _texts(data: Mapping[str, Any]) -> dict[str, str]:
    return {name: str(value) for name, value in data.items()}


def _check_engines(engines: Mapping[str, Mapping[str, EngineEntry]], recipe: Recipe) -> None:
    """Every component must serve every bucket. Raises ValueError, and KeyError without a denoiser."""
    built = engines["denoiser"].keys()
    if not any(str(bucket) in built for bucket in recipe.buckets):
        raise ValueError("engines.denoiser has no bucket of the recipe")
    for component, by in engines.items():
        missing = sorted(built - by.keys())
        if missing and ANY not in by:
            raise ValueError(f"engines.{component} lacks {', '.join(missing)}")


def _check_paths(bundle: Bundle) -> None:
    """No path may leave the bundle, and nothing may be loaded that is not listed with its digest."""
    engines = [e for by in bundle.engines.values() for e in by.values()]
    folders = [*(e.folder for e in engines), *bundle.tokenizers.values()]
    single = [*(w for e in engines for w in e.weights.values()), *bundle.samplers.values()]
    root = bundle.path.resolve()
    allowed = _hub_repository(root) or root
    for name in [*bundle.files, *folders, *single]:
        pure = PurePosixPath(name)
        inside = not pure.is_absolute() and ".." not in pure.parts and "\\" not in name and ":" not in name
        if not inside or not (root / name).resolve().is_relative_to(allowed):
            raise BundleError("a path in the manifest leaves the bundle", where=bundle.path / MANIFEST, got=name)
    for name in single:
        if name not in bundle.files:
            raise BundleError("the manifest uses a file that it does not list", where=bundle.path / MANIFEST, got=name)
    for name in folders:
        _check_folder(bundle, name)


def _hub_repository(root: Path) -> Path | None:
    """The hub's cache folder of a repository, of which the resolved path `root` is a snapshot or lies in one.

    `snapshots/COMMIT/...` holds links into `blobs`. None where `root` is not in a snapshot.
    """
    repository = next((p.parent for p in root.parents if p.name == "snapshots"), None)
    return repository if repository is not None and (repository / "blobs").is_dir() else None


def _check_folder(bundle: Bundle, folder: str) -> None:
    """What a loader is given as a folder may hold listed files alone; a listed file that is missing `verify` finds."""
    prefix = f"{PurePosixPath(folder)}/"
    if not any(name.startswith(prefix) for name in bundle.files):
        where = bundle.path / MANIFEST
        raise BundleError("the manifest uses a folder of which it lists no file", where=where, got=folder, hint=AGAIN)
    path = bundle.path / folder
    present = (p for p in path.rglob("*") if p.is_symlink() or not p.is_dir())
    names = (p.relative_to(path).as_posix() for p in present)
    extra = sorted(name for name in names if prefix + name not in bundle.files)
    if extra:
        raise BundleError(
            "a folder of the bundle holds a file that the manifest does not list",
            where=path / extra[0],
            got=f"{len(extra)} of them" if len(extra) > 1 else None,
            hint="move it to another place, or copy the bundle again from where it was built",
        )


def describe_buckets(buckets: Iterable[Bucket]) -> str:
    """Buckets as text, separated by commas."""
    return ", ".join(str(b) for b in buckets)
