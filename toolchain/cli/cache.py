"""`diffbuild cache`: the artifact store on the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain import api
from toolchain.cli import progress
from toolchain.cli.console import GATE_FAILED, answer, examples, json_option, store_option, verbosity
from toolchain.cli.text import age, megabytes
from toolchain.terminal import table

if TYPE_CHECKING:
    from toolchain.store.artifacts import Artifact
    from toolchain.store.upkeep import CleanUp, Listing, StoreVerdict


@click.group(epilog=examples("diffbuild cache ls", "diffbuild cache gc --dry-run"))
def cache() -> None:
    """Look at the artifact store, check it, and clean it up."""


@cache.command("ls", epilog=examples("diffbuild cache ls --store /data/store"))
@store_option
@json_option
@verbosity
def cache_ls(store: Path | None, as_json: bool) -> None:
    """List every artifact with its size and its last use."""
    listing = api.list_artifacts(store)
    answer(as_json, lambda: listing_json(listing), lambda: listing_lines(listing))


@cache.command("verify", epilog=examples("diffbuild cache verify", "diffbuild cache verify --quarantine"))
@store_option
@click.option("--quarantine", is_flag=True, help="Move damaged artifacts aside, so that the next build rebuilds them.")
@json_option
@verbosity
def cache_verify(store: Path | None, quarantine: bool, as_json: bool) -> None:
    """Read every byte of the store; exit code 3 when an artifact is damaged."""
    with progress.working("reading the store"):
        verdict = api.verify_store(store, quarantine=quarantine)
    answer(as_json, lambda: verdict_json(verdict), lambda: verdict_lines(verdict))
    raise click.exceptions.Exit(GATE_FAILED if verdict.damage else 0)


@cache.command("gc", epilog=examples("diffbuild cache gc --dry-run", "diffbuild cache gc --min-age 24"))
@store_option
@click.option("--dry-run", is_flag=True, help="Only say what would be removed.")
@click.option(
    "--min-age",
    "hours",
    type=click.FloatRange(0),
    default=1.0,
    show_default=True,
    metavar="HOURS",
    help="Keep what was built or reused within this time.",
)
@json_option
@verbosity
def cache_gc(store: Path | None, dry_run: bool, hours: float, as_json: bool) -> None:
    """Remove the artifacts that no bundle was built from, and what killed builds left.

    Bundles are complete copies and keep working. Artifacts of a bundle that is still where it was built are kept, so
    that building it again stays fast.
    """
    cleanup = api.clean_store(store, dry_run=dry_run, min_age_s=hours * 3600)
    answer(as_json, lambda: cleanup_json(cleanup), lambda: cleanup_lines(cleanup))


def _size(artifact: Artifact) -> int:
    return sum(record.size for record in artifact.files.values())


def listing_json(listing: Listing) -> dict[str, Any]:
    """The document of `cache ls`."""
    entries = [{"stage": a.stage, "subject": a.subject, "key": a.key, "bytes": _size(a)} for a in listing.artifacts]
    return {"store": str(listing.store), "artifacts": entries, "bytes": sum(map(_size, listing.artifacts))}


def listing_lines(listing: Listing) -> Iterator[str]:
    """What `cache ls` prints."""
    if not listing.artifacts:
        yield f"{listing.store}: no artifacts" + ("" if listing.store.is_dir() else "; there is no such folder")
        return
    rows = [
        [artifact.stage, artifact.subject, megabytes(_size(artifact)), age(idle_s), artifact.key[:12]]
        for artifact, idle_s in zip(listing.artifacts, listing.idle_s, strict=True)
    ]
    yield from table(rows, head=["stage", "subject", "size", "used", "key"], indent="")
    yield f"{listing.store}: {len(rows)} artifacts, {megabytes(sum(map(_size, listing.artifacts)))}"


def verdict_json(verdict: StoreVerdict) -> dict[str, Any]:
    """The document of `cache verify`."""
    return {"store": str(verdict.store), "problems": [vars(damage) for damage in verdict.damage]}


def verdict_lines(verdict: StoreVerdict) -> Iterator[str]:
    """What `cache verify` prints."""
    if not verdict.damage:
        yield f"{verdict.store}: all {verdict.intact} artifacts are intact"
        return
    for damage in verdict.damage:
        moved = f"; moved to {damage.moved_to}" if damage.moved_to else ""
        yield f"damaged: {damage.path}: {damage.problem}{moved}"
    if not all(damage.moved_to for damage in verdict.damage):
        yield "to rebuild them: diffbuild cache verify --quarantine, then build again"


def cleanup_json(cleanup: CleanUp) -> dict[str, Any]:
    """The document of `cache gc`."""
    report = cleanup.report
    return {
        "store": str(cleanup.store),
        "dry_run": cleanup.dry_run,
        "removed": dict(report.removed),
        "kept": dict(report.kept),
        "leftovers": dict(report.leftovers),
        "dropped_bundles": list(report.dropped_bundles),
        "bytes_freed": report.bytes_freed,
    }


def cleanup_lines(cleanup: CleanUp) -> Iterator[str]:
    """What `cache gc` prints."""
    report = cleanup.report
    remove, forget = ("would remove", "would forget") if cleanup.dry_run else ("removed", "forgot")
    for name, size in [*report.removed.items(), *report.leftovers.items()]:
        yield f"{remove} {name}, {megabytes(size)}"
    for bundle in report.dropped_bundles:
        yield f"{forget} the bundle {bundle}, which is gone"
    in_use = sum(reason.startswith("part of ") for reason in report.kept.values())
    yield (
        f"{cleanup.store}: {remove} {len(report.removed)} artifacts and {len(report.leftovers)} leftovers, "
        f"{megabytes(report.bytes_freed)}; kept {in_use} that bundles need and {len(report.kept) - in_use} used lately"
    )
