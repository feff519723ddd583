"""`diffbuild trace`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain import api
from toolchain.cli import progress
from toolchain.cli.console import answer, bundle_argument, examples, json_option, size, verbosity


@click.command(
    epilog=examples(
        "diffbuild trace bundle --output trace.json",
        "diffbuild trace bundle --output trace.json --steps 4 --operators",
    )
)
@bundle_argument
@click.option(
    "--output",
    "-o",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.json",
    help="Open it in https://ui.perfetto.dev or chrome://tracing.",
)
@click.option("--prompt", metavar="TEXT", help="What to draw.  [default: the recipe's first]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the recipe's]")
@click.option("--size", type=size, metavar="HEIGHTxWIDTH", help="One of the built sizes.  [default: the first]")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), default=0, show_default=True, help="Of the picture.")
@click.option("--operators", is_flag=True, help="Also profile every operator, which slows each a little. CPU alone.")
@json_option
@verbosity
def trace(bundle: Path, output: Path, as_json: bool, **options: Any) -> None:
    """Record one generation on a timeline.

    Shows stages, evaluations and engine calls, with --operators what each engine does inside, and prints where the time
    went. On a GPU, launches are NVTX ranges too where nvtx is installed.
    """
    with progress.working(f"tracing {bundle}"):
        recorded = api.trace_bundle(bundle, output, **options)
    answer(as_json, lambda: {"trace": str(output), **recorded.summary()}, lambda: [f"{output}:", *recorded.lines()])
