"""Manifests of artifacts: their keys and files, and how two sets of inputs differ.

A manifest holds the sha256 of every file and of itself. That detects damage, but is not a signature: somebody may
rewrite both.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import NamedTuple, TypeAlias

from toolchain.errors import StoreError
from toolchain.store.files import file_digest, store_errors, walk_files

Json: TypeAlias = "bool | int | float | str | list[Json] | dict[str, Json] | None"

FORMAT = 1
MANIFEST = "manifest.json"
STAGE = re.compile(r"[a-z0-9][a-z0-9_.-]*")
KEY = re.compile(r"[0-9a-f]{64}")


def content_key(stage: str, inputs: Mapping[str, Json]) -> str:
    """sha256, in hex, of the canonical JSON of stage and inputs. StoreError for what JSON cannot hold exactly."""
    return hashlib.sha256(canonical({"stage": stage, "inputs": dict(inputs)})).hexdigest()


def canonical(value: Json, *, indent: int | None = None) -> bytes:
    """The one JSON text of a value. StoreError for what JSON cannot hold exactly."""
    _require_string_keys(value, "inputs")
    try:
        separators = (",", ":") if indent is None else None
        text = json.dumps(value, sort_keys=True, allow_nan=False, indent=indent, separators=separators)
    except (TypeError, ValueError) as error:
        raise StoreError(f"cannot make a key: {error}", expected="JSON values, numbers finite") from error
    return text.encode("ascii")


def _require_string_keys(value: Json, path: str) -> None:
    """json.dumps writes the keys 1 and "1" alike, which would give two inputs one key."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if not isinstance(name, str):
                raise StoreError("cannot make a key", where=path, expected="names that are strings", got=repr(name))
            _require_string_keys(inner, f"{path}.{name}")
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            _require_string_keys(inner, f"{path}[{index}]")


@dataclass(frozen=True)
class FileRecord:
    """What a manifest says about one file; `size` in bytes."""

    sha256: str
    size: int


@dataclass(frozen=True)
class Artifact:
    """A complete entry of the store, in the folder `path`.

    `files` maps names relative to it, with slashes, to their records.
    """

    stage: str
    subject: str
    key: str
    path: Path
    inputs: Mapping[str, Json] = field(hash=False)
    files: Mapping[str, FileRecord] = field(hash=False)

    def file(self, name: str) -> Path:
        """The path of one of the files; StoreError when the artifact has no such file."""
        if name not in self.files:
            has = ", ".join(sorted(self.files))
            raise StoreError(f"{self.stage} {self.subject} has no such file", where=self.path, expected=has, got=name)
        return self.path / name

    def verify(self) -> None:
        """Reads every byte. StoreError for the first file that differs from the manifest or is not in it."""
        for name, what, expected, got in self.problems():
            raise StoreError(
                f"artifact {self.stage} {self.subject} is damaged: {name}: {what}",
                where=self.path / name,
                expected=expected,
                got=got,
                hint=f"diffbuild cache verify --quarantine --store {self.path.parent.parent}, then build again",
            )

    def problems(self) -> Iterator[tuple[str, str, object, object]]:
        """Every problem of the artifact's files, as (file, problem, expected, got)."""
        loaded = load(self.path)
        if loaded != self:
            yield MANIFEST, loaded if isinstance(loaded, str) else "changed since it was read", None, None
        if self.path.is_symlink():
            yield ".", "is a symbolic link", "a folder", "a link"
        with store_errors("cannot read an artifact", self.path):
            present = dict(walk_files(self.path))
        for name, record in self.files.items():
            if name not in present:
                yield name, "is missing", f"{record.size} bytes", None
            elif not stat.S_ISREG(present[name].st_mode):
                yield name, "is no regular file", "a regular file", stat.filemode(present[name].st_mode)
            elif present[name].st_size != record.size:
                yield name, "has another size", f"{record.size} bytes", f"{present[name].st_size} bytes"
            elif (digest := file_digest(self.path / name)) != record.sha256:
                yield name, "has another content", f"sha256 {record.sha256}", f"sha256 {digest}"
        for name in sorted(present.keys() - self.files.keys() - {MANIFEST}):
            yield name, "is not in the manifest", None, "an extra file"


def _encode(body: dict[str, Json]) -> bytes:
    """A manifest's bytes: the body and the digest of the body."""
    digest = hashlib.sha256(canonical(body)).hexdigest()
    return canonical({**body, "digest": digest}, indent=1) + b"\n"


def load(folder: Path) -> Artifact | str:
    """The artifact in `folder` as its manifest describes it, or what is wrong. StoreError when it cannot be read."""
    path = folder / MANIFEST
    with store_errors("cannot read a manifest", path):
        try:
            if not stat.S_ISREG(os.lstat(path).st_mode):
                return "is no regular file"
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return "is missing"
    try:
        body = json.loads(raw)
        del body["digest"]
        # Byte for byte, so that no edit at all passes, not even of white space.
        if body["format"] != FORMAT or _encode(body) != raw:
            return "is not what was written"
        files = {name: FileRecord(sha256=f["sha256"], size=f["size"]) for name, f in body["files"].items()}
        escaping = [name for name in files if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts]
        names = (folder.parent.name, folder.name)
        if escaping or names != (body["stage"], body["key"]) or content_key(body["stage"], body["inputs"]) != names[1]:
            return "does not match its folder"
        return Artifact(body["stage"], body["subject"], body["key"], folder, body["inputs"], files)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, StoreError) as error:
        return f"cannot be parsed ({type(error).__name__})"


class Change(NamedTuple):
    """A field of an artifact's inputs that changed: its dotted path, and both values as JSON, long ones cut."""

    field: str
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.field}: {self.before} -> {self.after}"


def differences(old: Json, new: Json, path: str = "") -> Iterator[Change]:
    """What differs; dicts and lists of one length are walked."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in sorted(old.keys() | new.keys()):
            inner = f"{path}.{name}" if path else name
            if name not in old or name not in new:
                yield Change(inner, *(_shorten(side[name]) if name in side else "(absent)" for side in (old, new)))
            else:
                yield from differences(old[name], new[name], inner)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for index, pair in enumerate(zip(old, new, strict=True)):
            yield from differences(*pair, f"{path}[{index}]")
    elif (before := json.dumps(old, sort_keys=True)) != (after := json.dumps(new, sort_keys=True)):
        # 1 and 1.0 are equal in Python and give different keys, so compare what is written.
        same = next((i for i, (a, b) in enumerate(zip(before, after, strict=False)) if a != b), 0)
        yield Change(path, _shorten(old, same), _shorten(new, same))


def _shorten(value: Json, same: int = 0, limit: int = 60) -> str:
    """The JSON of a value, cut to about `limit` characters around the first that differs, the one after `same`."""
    text = json.dumps(value, sort_keys=True)
    if len(text) <= limit:
        return text
    start = max(0, min(same - 10, len(text) - limit))
    return ("..." if start else "") + text[start : start + limit] + ("..." if start + limit < len(text) else "")


def _versions() -> dict[str, Json]:
    # Imported here: a run that builds nothing does not pay for it.
    from importlib import metadata
    from platform import machine, python_version, system

    try:
        diffbuild = metadata.version("diffbuild")
    except metadata.PackageNotFoundError:
        diffbuild = "unknown"
    return {"diffbuild": diffbuild, "python": python_version(), "platform": f"{system()} {machine()}"}


def manifest_of(folder: Path, stage: str, subject: str, key: str, inputs: dict[str, Json]) -> bytes:
    """The manifest of what a build wrote into `folder`; reads every file. StoreError, OSError."""
    files: dict[str, Json] = {
        name: {"sha256": file_digest(folder / name), "size": status.st_size} for name, status in walk_files(folder)
    }
    if MANIFEST in files:
        raise StoreError(f"the build of {stage} {subject} wrote a {MANIFEST}, a name that belongs to the store")
    body: dict[str, Json] = {"format": FORMAT, "stage": stage, "subject": subject, "key": key, "inputs": inputs}
    return _encode({**body, "files": files, "created": datetime.now(UTC).isoformat(), "versions": _versions()})
