"""Commands about a store and this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.api.arguments import open_store

if TYPE_CHECKING:
    from toolchain.store.upkeep import CleanUp, Listing, StoreVerdict


def list_artifacts(store: str | Path | None = None) -> Listing:
    """Every artifact of a store, with its size and its last use. StoreError."""
    from toolchain.store import upkeep

    return upkeep.list_artifacts(open_store(store))


def verify_store(store: str | Path | None = None, *, quarantine: bool = False) -> StoreVerdict:
    """Reads every byte of a store; `quarantine` moves damaged artifacts aside. StoreError."""
    from toolchain.store import upkeep

    return upkeep.verify(open_store(store), quarantine=quarantine)


def clean_store(store: str | Path | None = None, *, dry_run: bool = False, min_age_s: float = 3600) -> CleanUp:
    """Removes artifacts that no bundle was built from: see `Store.gc`. StoreError."""
    from toolchain.store import upkeep

    return upkeep.clean(open_store(store), dry_run=dry_run, min_age_s=min_age_s)


def examine_machine(store: str | Path | None = None) -> dict[str, Any]:
    """What this machine can do, as `diffbuild doctor --json` prints it; `works` is whether a backend can run here."""
    from toolchain.engines.machine import examine
    from toolchain.store.artifacts import default_store

    return examine(Path(store or default_store()))
