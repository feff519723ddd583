"""The artifact store: results found by what went into them, never because a file exists.

Layout, known to this module alone:

    <stage>/<key>/manifest.json, files    a complete artifact; the key is the hash of its stage and inputs
    .locks/<key>                          one lock file per key, never deleted
    .tmp/<key>.*                          folders being built
    .quarantine/                          damaged entries that were moved aside
    .bundles.json                         the bundles that keep artifacts alive
    .stamps/                              digests of large files, by identity and times of the file

An artifact appears by one rename, whole or not at all. Names that this table does not list are ignored.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path

from toolchain.errors import StoreError
from toolchain.store.files import (
    file_digest,
    fill_errors,
    locked,
    make_folder,
    publish_folder,
    require_own_files,
    store_errors,
    sync,
    sync_tree,
    temporary_folder,
    temporary_name,
    walk_files,
    write_atomic,
    write_new,
)
from toolchain.store.manifest import (
    FORMAT,
    KEY,
    MANIFEST,
    STAGE,
    Artifact,
    FileRecord,
    Json,
    canonical,
    content_key,
    differences,
    load,
    manifest_of,
)

__all__ = [
    "Artifact",
    "FileRecord",
    "GcReport",
    "Json",
    "Store",
    "content_key",
    "default_store",
    "file_digest",
    "publish_folder",
    "write_atomic",
]

# A file changed within one tick of the filesystem's clock keeps its times: only files older than this are stamped.
_SETTLED_NS = 2_000_000_000


def default_store() -> Path:
    """$DIFFBUILD_STORE, or `artifacts` in the working directory."""
    return Path(os.environ.get("DIFFBUILD_STORE", "artifacts"))


@dataclass(frozen=True)
class GcReport:
    """What `Store.gc` did, or would do. Artifacts are named "stage/key"; sizes in bytes."""

    removed: Mapping[str, int]
    kept: Mapping[str, str]  # the reason
    leftovers: Mapping[str, int]  # temporary and quarantined entries that went, by path below the store
    dropped_bundles: tuple[str, ...]  # registered bundles that are no longer there

    @property
    def bytes_freed(self) -> int:
        return sum(self.removed.values()) + sum(self.leftovers.values())


def _bytes_in(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(status.st_size for _, status in walk_files(path))
    return os.lstat(path).st_size


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _age_s(path: Path) -> float:
    """Seconds since an artifact was built or last reused; for anything else, since its last change."""
    newest = -math.inf
    for candidate in (path, path / MANIFEST):
        with suppress(FileNotFoundError, NotADirectoryError):
            newest = max(newest, os.lstat(candidate).st_mtime)
    return time.time() - newest


class Store:
    """A folder of artifacts that several processes may read, fill and clean at the same time."""

    def __init__(self, root: Path) -> None:
        """Creates nothing; the folder appears with the first artifact."""
        self.root = Path(os.path.abspath(root))

    def lookup(self, stage: str, key: str) -> Artifact | None:
        """The artifact, or None. Reads the manifest and the file sizes; damage that this shows counts as absent."""
        artifact = load(self._folder(stage, key))
        if isinstance(artifact, str):
            return None
        for name, record in artifact.files.items():
            with store_errors("cannot read an artifact", artifact.path):
                try:
                    status = os.lstat(artifact.path / name)
                except (FileNotFoundError, NotADirectoryError):
                    return None
            if not stat.S_ISREG(status.st_mode) or status.st_size != record.size:
                return None
        return artifact

    def explain(
        self, stage: str, subject: str, inputs: Mapping[str, Json], known: Sequence[Artifact] | None = None
    ) -> list[str]:
        """For a miss: the fields that differ from the stage's and subject's most recently built or reused artifact.

        Lines "path.to.field: old -> new"; empty when none was ever built. `known`: what `by_use` gave, for many calls.
        """
        listed = self.by_use() if known is None else known
        latest = next((a for a in listed if (a.stage, a.subject) == (stage, subject)), None)
        if latest is None:
            return []
        return list(differences(dict(latest.inputs), json.loads(canonical(dict(inputs)))))

    def get_or_build(
        self, stage: str, subject: str, inputs: Mapping[str, Json], build: Callable[[Path], None]
    ) -> tuple[Artifact, bool]:
        """The artifact of these inputs, and whether it was built now.

        On a miss `build` writes files, flat or nested, into the empty folder it is given. Of several processes and
        threads that ask for one key, one builds and the others wait. What `build` raises is raised here, and nothing of
        it stays. `subject` is for people and for `explain`; it is not part of the key.
        """
        key = content_key(stage, inputs)
        copied: dict[str, Json] = json.loads(canonical(dict(inputs)))  # `build` may change what it was called with
        if (hit := self._reuse(stage, key)) is not None:
            return hit, False
        with locked(self._lock(key), wait=True, purpose=f"it builds {stage} {subject}"):
            if (hit := self._reuse(stage, key)) is not None:
                return hit, False
            for leftover in self.root.glob(f".tmp/{key}.*"):  # of a killed process: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            with temporary_folder(self.root / ".tmp" / temporary_name(key)) as folder:
                with fill_errors(f"cannot build {stage} {subject}", folder):
                    build(folder)
                with store_errors(f"cannot publish {stage} {subject}", self.root):
                    self._publish(folder, stage, subject, key, copied)
            built = self.lookup(stage, key)
        if built is None:
            raise StoreError("an artifact vanished while it was published", where=self._folder(stage, key))
        return built, True

    def artifacts(self) -> Iterator[Artifact]:
        """All complete artifacts, by stage and key."""
        for stage, key, _ in self._entries():
            if (artifact := self.lookup(stage, key)) is not None:
                yield artifact

    def by_use(self) -> list[Artifact]:
        """All complete artifacts, the one built or reused last first."""
        return sorted(self.artifacts(), key=lambda a: _age_s(a.path))

    def verify(self) -> list[tuple[Artifact | Path, str]]:
        """Reads every byte of the store; lists what is damaged and how.

        (artifact, problem), or (folder, problem) where the manifest cannot be read.
        """
        problems: list[tuple[Artifact | Path, str]] = []
        for _, _, folder in self._entries():
            place: Artifact | Path = folder
            try:
                loaded = load(folder)
                if isinstance(loaded, str):
                    problems.append((folder, f"{MANIFEST}: {loaded}"))
                    continue
                place = loaded
                problems += [(loaded, f"{name}: {what}") for name, what, _, _ in loaded.problems()]
            except StoreError as error:
                problems.append((place, error.what))
        return problems

    def quarantine(self, stage: str, key: str) -> Path:
        """Moves an entry aside, for one that `verify` found damaged, so that the next build makes it anew."""
        with (
            locked(self._lock(key), wait=True, purpose=f"it builds {stage}"),
            store_errors("cannot move a damaged artifact aside", self._folder(stage, key)),
        ):
            return self._set_aside(stage, key)

    def digest_of(self, path: Path) -> str:
        """`file_digest`, remembered for as long as device, inode, size and times of the file stay the same.

        A lost or damaged stamp only costs the time to read the file again.
        """
        before = self._identity(path)
        stamp = self.root / ".stamps" / hashlib.sha256(before.encode()).hexdigest()
        with suppress(OSError, ValueError):
            digest, check = stamp.read_text("ascii").split()
            if check == hashlib.sha256(f"{before} {digest}".encode()).hexdigest():
                return digest
        settled = time.time_ns() - max(int(t) for t in before.split()[3:]) > _SETTLED_NS
        digest = file_digest(path)
        if settled and self._identity(path) == before:
            check = hashlib.sha256(f"{before} {digest}".encode()).hexdigest()
            with suppress(StoreError):
                write_atomic(stamp, f"{digest} {check}\n".encode())
        return digest

    def register_bundle(self, bundle: Path, keys: Iterable[str]) -> None:
        """Keeps the artifacts `keys`, each "stage/key", from `gc` for as long as `bundle` holds a bundle.json.

        Writes nothing, and takes no lock, when just that is registered already.
        """
        refs = sorted(set(keys))
        for ref in refs:
            stage, _, key = ref.partition("/")
            self._folder(stage, key)
        if self._bundles().get(os.path.abspath(bundle)) == refs:
            return
        with locked(self._lock("bundles"), wait=True, purpose="it changes the list of bundles"):
            self._write_bundles({**self._bundles(), os.path.abspath(bundle): refs})

    def gc(self, *, dry_run: bool = False, min_age_s: float = 3600) -> GcReport:
        """Removes what no registered bundle refers to, and what killed processes left.

        Never an artifact that is being built, or that was built or reused within `min_age_s`. A registered bundle
        without its bundle.json is dropped from the list first. With `dry_run` nothing changes.
        """
        removed: dict[str, int] = {}
        kept: dict[str, str] = {}
        if not self.root.is_dir():
            return GcReport(removed, kept, {}, ())
        with (
            locked(self._lock("bundles"), wait=True, purpose="it changes the list of bundles"),
            store_errors("cannot clean the store", self.root),
        ):
            bundles = self._bundles()
            live = {bundle: refs for bundle, refs in bundles.items() if _holds_bundle(bundle)}
            if len(live) < len(bundles) and not dry_run:
                self._write_bundles(live)
            referenced = {ref: bundle for bundle, refs in live.items() for ref in refs}
            for stage, key, folder in list(self._entries()):
                ref = f"{stage}/{key}"
                if ref in referenced:
                    kept[ref] = f"part of {referenced[ref]}"
                elif isinstance(gone := self._collect(folder, key, min_age_s=min_age_s, dry_run=dry_run), int):
                    removed[ref] = gone
                else:
                    kept[ref] = gone
            leftovers = self._collect_leftovers(min_age_s=min_age_s, dry_run=dry_run)
        return GcReport(removed, kept, leftovers, tuple(sorted(bundles.keys() - live.keys())))

    # --- the store's tree ---------------------------------------------------------------------------------------------

    def _folder(self, stage: str, key: str) -> Path:
        if not STAGE.fullmatch(stage) or not KEY.fullmatch(key):
            raise StoreError(
                "not the name of an artifact", expected="stage/key, the key 64 hex digits", got=f"{stage}/{key}"
            )
        return self.root / stage / key

    def _lock(self, name: str) -> Path:
        return self.root / ".locks" / name

    def _entries(self) -> Iterator[tuple[str, str, Path]]:
        """(stage, key, folder) of everything at an artifact's place, complete or not."""
        with store_errors("cannot read the store", self.root):
            stages = sorted(self.root.iterdir()) if self.root.is_dir() else []
            for stage in (s for s in stages if STAGE.fullmatch(s.name) and s.is_dir()):
                for folder in sorted(stage.iterdir()):
                    if KEY.fullmatch(folder.name):
                        yield stage.name, folder.name, folder

    def _reuse(self, stage: str, key: str) -> Artifact | None:
        """`lookup` that also marks the artifact as used now, which `gc` looks at."""
        found = self.lookup(stage, key)
        if found is not None:
            try:
                os.utime(found.path / MANIFEST)
            except FileNotFoundError:
                return None  # `gc` was faster
            except OSError:
                pass  # a store on a read-only disk serves its artifacts all the same
        return found

    def _publish(self, folder: Path, stage: str, subject: str, key: str, inputs: dict[str, Json]) -> None:
        require_own_files(folder)
        write_new(folder / MANIFEST, manifest_of(folder, stage, subject, key, inputs))
        sync_tree(folder)
        final = self._folder(stage, key)
        make_folder(final.parent)
        if os.path.lexists(final):
            self._set_aside(stage, key)
        os.rename(folder, final)
        sync(final.parent)

    def _set_aside(self, stage: str, key: str) -> Path:
        aside = self.root / ".quarantine" / temporary_name(f"{stage}-{key}")
        make_folder(aside.parent)
        os.rename(self._folder(stage, key), aside)
        with suppress(OSError):
            os.utime(aside)  # it is evidence: `gc` counts its age from now
        return aside

    # --- clean-up -----------------------------------------------------------------------------------------------------

    def _bundles(self) -> dict[str, list[str]]:
        path = self.root / ".bundles.json"
        try:
            with store_errors("cannot read the list of bundles", path):
                raw = path.read_bytes() if path.exists() else b'{"format": 1, "bundles": {}}'
            listed = json.loads(raw)
            if listed["format"] != FORMAT or not all(isinstance(refs, list) for refs in listed["bundles"].values()):
                raise ValueError(raw[:40])
            return {str(bundle): [str(ref) for ref in refs] for bundle, refs in listed["bundles"].items()}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            # Taken as empty, it would let `gc` remove what the bundles need.
            raise StoreError(
                "the list of bundles is damaged", where=path, hint="delete the file, then build each bundle again"
            ) from error

    def _write_bundles(self, bundles: Mapping[str, list[str]]) -> None:
        listed: dict[str, Json] = {bundle: list(refs) for bundle, refs in bundles.items()}
        write_atomic(self.root / ".bundles.json", canonical({"format": FORMAT, "bundles": listed}, indent=1) + b"\n")

    def _collect(self, folder: Path, key: str, *, min_age_s: float, dry_run: bool) -> int | str:
        """Removes one entry that no bundle needs; returns its bytes, or the reason when it stays."""
        young = f"used within the last {min_age_s:g} s"
        with locked(self._lock(key), wait=False, purpose="") as mine:
            if not mine or not os.path.lexists(folder):
                return "being built"
            if _age_s(folder) < min_age_s:
                return young
            size = _bytes_in(folder)
            if not dry_run:
                trash = self.root / ".tmp" / temporary_name(key)
                make_folder(trash.parent)
                os.rename(folder, trash)
                # `_reuse` takes no lock: it marks the use before this rename, which shows here, or fails after it.
                if _age_s(trash) < min_age_s:
                    os.rename(trash, folder)
                    return young
                _remove(trash)
        return size

    def _collect_leftovers(self, *, min_age_s: float, dry_run: bool) -> dict[str, int]:
        """Removes old temporary and quarantined entries that no running build owns; their bytes, by relative path."""
        gone: dict[str, int] = {}
        for pattern in (".tmp/*", ".quarantine/*", ".stamps/.*.partial", "..bundles.json.*.partial"):
            for path in sorted(self.root.glob(pattern)):
                key = path.name.partition(".")[0]
                owned = path.parent.name == ".tmp" and KEY.fullmatch(key)
                with locked(self._lock(key), wait=False, purpose="") if owned else nullcontext(True) as mine:
                    if mine and _age_s(path) >= min_age_s:
                        gone[str(path.relative_to(self.root))] = _bytes_in(path)
                        if not dry_run:
                            _remove(path)
        return gone

    @staticmethod
    def _identity(path: Path) -> str:
        with store_errors("cannot read a file", path):
            s = os.stat(path)
        return f"{s.st_dev} {s.st_ino} {s.st_size} {s.st_mtime_ns} {s.st_ctime_ns}"


def _holds_bundle(bundle: str) -> bool:
    """Whether the bundle is still there; a folder that may not be read counts as there."""
    try:
        os.stat(os.path.join(bundle, "bundle.json"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
