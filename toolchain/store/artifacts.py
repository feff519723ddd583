"""The artifact store: results found by what went into them, never because a file exists.

An artifact appears by one rename, whole or not at all. `toolchain.store.tree` says where things lie.
"""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from toolchain.errors import StoreError
from toolchain.store.bundles import read_bundle_list, write_bundle_list
from toolchain.store.collect import GcReport, collect_garbage
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
    write_atomic,
    write_new,
)
from toolchain.store.manifest import (
    MANIFEST,
    Artifact,
    Change,
    FileRecord,
    Json,
    canonical,
    content_key,
    differences,
    load,
    manifest_of,
)
from toolchain.store.stamps import stamped_digest
from toolchain.store.tree import Tree, age_s

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


def default_store() -> Path:
    """$DIFFBUILD_STORE, or `artifacts` in the working directory."""
    return Path(os.environ.get("DIFFBUILD_STORE", "artifacts"))


class Store:
    """A folder of artifacts that several processes may read, fill and clean at the same time."""

    def __init__(self, root: Path) -> None:
        """Creates nothing; the folder appears with the first artifact."""
        self.root = Path(os.path.abspath(root))
        self._tree = Tree(self.root)

    def lookup(self, stage: str, key: str) -> Artifact | None:
        """The artifact, or None. Reads the manifest and the file sizes; damage that this shows counts as absent."""
        artifact = load(self._tree.folder(stage, key))
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
    ) -> list[Change]:
        """For a miss: the fields that differ from the stage's and subject's most recently built or reused artifact.

        Empty when none was ever built. `known`: what `by_use` gave, for many calls.
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
        with locked(self._tree.lock(key), wait=True, purpose=f"it builds {stage} {subject}"):
            if (hit := self._reuse(stage, key)) is not None:
                return hit, False
            for leftover in self.root.glob(f".tmp/{key}.*"):  # of a killed process: we hold the lock
                shutil.rmtree(leftover, ignore_errors=True)
            with temporary_folder(self._tree.temporary(key)) as folder:
                with fill_errors(f"cannot build {stage} {subject}", folder):
                    build(folder)
                with store_errors(f"cannot publish {stage} {subject}", self.root):
                    self._publish(folder, stage, subject, key, copied)
            built = self.lookup(stage, key)
        if built is None:
            raise StoreError("an artifact vanished while it was published", where=self._tree.folder(stage, key))
        return built, True

    def partial(self, key: str) -> Path:
        """A file, in a folder that may be missing, for what a long build of `key` has done so far: after an
        interruption the next goes on from there, and removes it at its end. `gc` removes one that is old."""
        return self._tree.partial(key)

    def artifacts(self) -> Iterator[Artifact]:
        """All complete artifacts, by stage and key."""
        for stage, key, _ in self._tree.entries():
            if (artifact := self.lookup(stage, key)) is not None:
                yield artifact

    def by_use(self) -> list[Artifact]:
        """All complete artifacts, most recently used first: by when they were built or reused."""
        return sorted(self.artifacts(), key=lambda a: age_s(a.path))

    def verify(self) -> list[tuple[Artifact | Path, str]]:
        """Reads every byte of the store; lists what is damaged and how.

        (artifact, problem), or (folder, problem) where the manifest cannot be read.
        """
        problems: list[tuple[Artifact | Path, str]] = []
        for _, _, folder in self._tree.entries():
            entry: Artifact | Path = folder
            try:
                loaded = load(folder)
                if isinstance(loaded, str):
                    problems.append((folder, f"{MANIFEST}: {loaded}"))
                    continue
                entry = loaded
                problems += [(loaded, f"{name}: {what}") for name, what, _, _ in loaded.problems()]
            except StoreError as error:
                problems.append((entry, error.what))
        return problems

    def quarantine(self, stage: str, key: str) -> Path:
        """Moves a damaged entry into quarantine, so that the next build writes it again; its new path. StoreError."""
        with (
            locked(self._tree.lock(key), wait=True, purpose=f"it builds {stage}"),
            store_errors("cannot move a damaged artifact aside", self._tree.folder(stage, key)),
        ):
            return self._tree.set_aside(stage, key)

    def digest_of(self, path: Path) -> str:
        """The sha256 of any file, in hex, remembered while the file stays as it is: see `stamped_digest`."""
        return stamped_digest(path, self.root / ".stamps")

    def register_bundle(self, bundle: Path, keys: Iterable[str]) -> None:
        """Keeps the artifacts `keys`, each "stage/key", from `gc` for as long as `bundle` holds a bundle.json.

        Writes nothing, and takes no lock, when just that is registered already.
        """
        refs = sorted(set(keys))
        for ref in refs:
            stage, _, key = ref.partition("/")
            self._tree.folder(stage, key)
        if read_bundle_list(self._tree).get(os.path.abspath(bundle)) == refs:
            return
        with locked(self._tree.lock("bundles"), wait=True, purpose="it changes the list of bundles"):
            write_bundle_list(self._tree, {**read_bundle_list(self._tree), os.path.abspath(bundle): refs})

    def gc(self, *, dry_run: bool = False, min_age_s: float = 3600) -> GcReport:
        """Garbage collection: deletes artifacts that no registered bundle refers to, and what killed processes left.

        Keeps an artifact that is being built, or that was built or reused within `min_age_s`. A registered bundle
        without its bundle.json is dropped from the list first. With `dry_run` nothing changes. StoreError.
        """
        return collect_garbage(self._tree, dry_run=dry_run, min_age_s=min_age_s)

    def _reuse(self, stage: str, key: str) -> Artifact | None:
        """`lookup` that also marks the artifact as used now, which `gc` looks at."""
        artifact = self.lookup(stage, key)
        if artifact is not None:
            try:
                os.utime(artifact.path / MANIFEST)
            except FileNotFoundError:
                return None  # `gc` was faster
            except OSError:
                pass  # a store on a read-only disk serves its artifacts all the same
        return artifact

    def _publish(self, folder: Path, stage: str, subject: str, key: str, inputs: dict[str, Json]) -> None:
        require_own_files(folder)
        write_new(folder / MANIFEST, manifest_of(folder, stage, subject, key, inputs))
        sync_tree(folder)
        final = self._tree.folder(stage, key)
        make_folder(final.parent)
        if os.path.lexists(final):
            self._tree.set_aside(stage, key)
        os.rename(folder, final)
        sync(final.parent)
