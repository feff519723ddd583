"""Garbage collection of a store: artifacts that no registered bundle refers to, and what killed processes left."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

from toolchain.store.bundles import holds_bundle, read_bundle_list, write_bundle_list
from toolchain.store.files import locked, make_folder, store_errors, walk_files
from toolchain.store.manifest import KEY
from toolchain.store.tree import Tree, age_s


@dataclass(frozen=True)
class GcReport:
    """What `Store.gc` did or, in a dry run, would do.

    removed          "stage/key" of an artifact -> its size in bytes
    kept             "stage/key" -> why it stays
    leftovers        temporary and quarantined entries: path below the store -> size in bytes
    dropped_bundles  registered bundles that are gone
    """

    removed: Mapping[str, int]
    kept: Mapping[str, str]
    leftovers: Mapping[str, int]
    dropped_bundles: tuple[str, ...]

    @property
    def bytes_freed(self) -> int:
        """Of artifacts and leftovers together."""
        return sum(self.removed.values()) + sum(self.leftovers.values())


def collect_garbage(tree: Tree, *, dry_run: bool, min_age_s: float) -> GcReport:
    """Deletes what `Store.gc` describes. StoreError when the store cannot be read or written."""
    removed: dict[str, int] = {}
    kept: dict[str, str] = {}
    if not tree.root.is_dir():
        return GcReport(removed, kept, {}, ())
    with (
        locked(tree.lock("bundles"), wait=True, purpose="it changes the list of bundles"),
        store_errors("cannot clean the store", tree.root),
    ):
        bundles = read_bundle_list(tree)
        live = {bundle: refs for bundle, refs in bundles.items() if holds_bundle(bundle)}
        if len(live) < len(bundles) and not dry_run:
            write_bundle_list(tree, live)
        referenced = {ref: bundle for bundle, refs in live.items() for ref in refs}
        for stage, key, folder in list(tree.entries()):
            ref = f"{stage}/{key}"
            if ref in referenced:
                kept[ref] = f"part of {referenced[ref]}"
            elif isinstance(outcome := _collect(tree, folder, key, min_age_s=min_age_s, dry_run=dry_run), int):
                removed[ref] = outcome
            else:
                kept[ref] = outcome
        leftovers = _collect_leftovers(tree, min_age_s=min_age_s, dry_run=dry_run)
    return GcReport(removed, kept, leftovers, tuple(sorted(bundles.keys() - live.keys())))


def _collect(tree: Tree, folder: Path, key: str, *, min_age_s: float, dry_run: bool) -> int | str:
    """Removes one entry that no bundle needs; returns its bytes, or the reason when it stays."""
    young = f"used within the last {min_age_s:g} s"
    with locked(tree.lock(key), wait=False, purpose="") as held:
        if not held or not os.path.lexists(folder):
            return "being built"
        if age_s(folder) < min_age_s:
            return young
        size = _bytes_in(folder)
        if not dry_run:
            trash = tree.temporary(key)
            make_folder(trash.parent)
            os.rename(folder, trash)
            # `Store._reuse` takes no lock: it marks the use before this rename, which shows here, or fails after it.
            if age_s(trash) < min_age_s:
                os.rename(trash, folder)
                return young
            _remove(trash)
    return size


def _collect_leftovers(tree: Tree, *, min_age_s: float, dry_run: bool) -> dict[str, int]:
    """Removes old temporary and quarantined entries that no running build owns; their bytes, by relative path."""
    freed: dict[str, int] = {}
    for pattern in (".tmp/*", ".partial/*", ".quarantine/*", ".stamps/.*.partial", "..bundles.json.*.partial"):
        for path in sorted(tree.root.glob(pattern)):
            key = path.name.partition(".")[0]
            owned = path.parent.name in (".tmp", ".partial") and KEY.fullmatch(key)
            with locked(tree.lock(key), wait=False, purpose="") if owned else nullcontext(True) as held:
                if held and age_s(path) >= min_age_s:
                    freed[str(path.relative_to(tree.root))] = _bytes_in(path)
                    if not dry_run:
                        _remove(path)
    return freed


def _bytes_in(path: Path) -> int:
    if path.is_dir() and not path.is_symlink():
        return sum(status.st_size for _, status in walk_files(path))
    return os.lstat(path).st_size


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
