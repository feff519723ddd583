"""Looking after the store: what it holds, whether it is damaged, and what is removed."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from toolchain.store.artifacts import Artifact, GcReport, Store
from toolchain.store.manifest import MANIFEST


@dataclass(frozen=True)
class Listing:
    """Every artifact of a store. `idle_s` is the seconds since each was built or last reused."""

    store: Path
    artifacts: tuple[Artifact, ...]
    idle_s: tuple[float, ...]


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong with an artifact; `moved_to` is where its folder is now, None where it was left."""

    path: Path
    problem: str
    moved_to: Path | None


@dataclass(frozen=True)
class StoreVerdict:
    """What reading every byte of a store shows; `intact` counts the artifacts that are still in it."""

    store: Path
    damage: tuple[Damage, ...]
    intact: int


@dataclass(frozen=True)
class CleanUp:
    """What a clean-up of a store did or, with `dry_run`, would do."""

    store: Path
    dry_run: bool
    report: GcReport


def list_artifacts(store: Store) -> Listing:
    """Every complete artifact, by stage and key. StoreError when the store cannot be read."""
    now, artifacts, idle_s = time.time(), [], []
    for artifact in store.artifacts():
        try:
            idle_s.append(now - (artifact.path / MANIFEST).stat().st_mtime)
        except FileNotFoundError:
            continue  # removed by a garbage collection that runs beside this
        artifacts.append(artifact)
    return Listing(store.root, tuple(artifacts), tuple(idle_s))


def verify(store: Store, *, quarantine: bool = False) -> StoreVerdict:
    """Reads every byte of a store; with `quarantine` moves each damaged artifact aside, once.

    StoreError when the store cannot be read or written.
    """
    moved: dict[Path, Path | None] = {}
    damage = []
    for entry, problem in store.verify():
        path = entry if isinstance(entry, Path) else entry.path
        if path not in moved:
            moved[path] = store.quarantine(path.parent.name, path.name) if quarantine else None
        damage.append(Damage(path, problem, moved[path]))
    return StoreVerdict(store.root, tuple(damage), sum(1 for _ in store.artifacts()))


def clean(store: Store, *, dry_run: bool, min_age_s: float) -> CleanUp:
    """`Store.gc`, and what it was called with. StoreError when the store cannot be read or written."""
    return CleanUp(store.root, dry_run, store.gc(dry_run=dry_run, min_age_s=min_age_s))
