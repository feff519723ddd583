"""`diffbuild check` and `bench`: is it the same model, and how fast is it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from toolchain import api
from toolchain.cli import progress
from toolchain.cli.console import (
    GATE_FAILED,
    answer,
    bundle_argument,
    examples,
    json_option,
    model_option,
    origin_options,
    size,
    store_option,
    verbosity,
)

new_file = click.Path(dir_okay=False, path_type=Path)


@click.command(
    epilog=examples(
        "diffbuild check bundle --model owner/name --report check.json",
        "diffbuild check bundle --model owner/name --html check.html",
    )
)
@bundle_argument
@model_option
@origin_options
@store_option
@click.option("--report", type=new_file, metavar="FILE.json", help="Also write the report.")
@click.option("--html", type=new_file, metavar="FILE.html", help="Also write a page with pictures and charts.")
@click.option("--clip", type=click.Path(path_type=Path), metavar="DIR", help="Score pictures with this CLIP model.")
@json_option
@verbosity
def check(bundle: Path, model: str, as_json: bool, **options: Any) -> None:
    """Compare a bundle with the model that it was built from.

    Exit code 3 when a tolerance of the recipe is missed.
    """
    with progress.working(f"comparing {bundle} with {model}") as say:
        compared = api.check_bundle(bundle, model, **options, progress=say)
    answer(as_json, compared.to_json, compared.lines)
    raise click.exceptions.Exit(0 if compared.passed else GATE_FAILED)


@click.command(
    epilog=examples(
        "diffbuild bench bundle --repeats 10",
        "diffbuild bench bundle --model owner/name --against diffusers --against compile --html bench.html",
    )
)
@bundle_argument
@click.option("--model", metavar="DIR_OR_HUB_ID", help="The model that the bundle was built from, for --against.")
@origin_options
@store_option
@click.option(
    "--against", multiple=True, type=click.Choice(["diffusers", "compile", "openvino"]), help="Also measure, in turn."
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds.")
@click.option("--prompt", metavar="TEXT", help="What to draw.  [default: the recipe's first]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the recipe's]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Pictures of a call.")
@click.option("--size", type=size, metavar="HEIGHTxWIDTH", help="One of the built sizes.  [default: the first]")
@click.option("--sweep", multiple=True, type=click.Choice(["steps", "batch", "size"]), help="Also show how cost grows.")
@click.option("--html", type=click.Path(path_type=Path), metavar="FILE.html", help="Also write a page.")
@json_option
@verbosity
def bench(bundle: Path, as_json: bool, **options: Any) -> None:
    """Measure where the time of a picture goes, and how long others take for the same one.

    Others are diffusers, diffusers with torch.compile, and OpenVINO with the same recipe, as far as it can. Each
    contender runs in a process of its own, and they take turns, so that drift of the machine affects all alike.
    """
    with progress.working(f"measuring {bundle}") as say:
        measured = api.bench_bundle(bundle, progress=say, **options)
    answer(as_json, measured.to_json, measured.lines)
