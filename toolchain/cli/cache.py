"""`diffbuild cache`: the artifact store on the command line."""

from __future__ import annotations

from pathlib import Path

import click

from toolchain.cli import output as report
from toolchain.cli import progress
from toolchain.cli.console import GATE_FAILED, answer, examples, json_option, store_option, verbosity


@click.group(epilog=examples("diffbuild cache ls", "diffbuild cache gc --dry-run"))
def cache() -> None:
    """Look at the artifact store, check it, and clean it up."""


@cache.command("ls", epilog=examples("diffbuild cache ls --store /data/store"))
@store_option
@json_option
@verbosity
def cache_ls(store: Path | None, as_json: bool) -> None:
    """List every artifact with its size and its last use."""
    from toolchain.store.artifacts import Store, default_store

    opened = Store(store or default_store())
    found = list(opened.artifacts())
    answer(as_json, lambda: report.cache_json(opened.root, found), lambda: report.cache_lines(opened.root, found))


@cache.command("verify", epilog=examples("diffbuild cache verify", "diffbuild cache verify --quarantine"))
@store_option
@click.option(
    "--quarantine", is_flag=True, help="Move damaged artifacts aside, so that the next build makes them anew."
)
@json_option
@verbosity
def cache_verify(store: Path | None, quarantine: bool, as_json: bool) -> None:
    """Read every byte of the store; exit code 3 when an artifact is damaged."""
    from toolchain.store.artifacts import Store, default_store

    opened = Store(store or default_store())
    with progress.working(f"reading {opened.root}"):
        problems = report.damage(opened, quarantine)
        whole = sum(1 for _ in opened.artifacts())
    document = {"store": str(opened.root), "problems": problems}
    answer(as_json, lambda: document, lambda: report.damage_lines(opened.root, problems, whole))
    raise click.exceptions.Exit(GATE_FAILED if problems else 0)


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

    Bundles are complete copies: they keep working. Artifacts of a bundle that is still at the place where it was built
    are kept, so that building it again stays fast.
    """
    from toolchain.store.artifacts import Store, default_store

    opened = Store(store or default_store())
    done = opened.gc(dry_run=dry_run, min_age_s=hours * 3600)
    answer(
        as_json,
        lambda: report.gc_json(opened.root, done, dry_run),
        lambda: report.gc_lines(opened.root, done, dry_run),
    )
