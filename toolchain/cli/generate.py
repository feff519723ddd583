"""`diffbuild generate`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain import api
from toolchain.cli import progress
from toolchain.cli.console import (
    answer,
    aspect,
    bundle_argument,
    examples,
    json_option,
    numbers,
    position,
    size,
    verbosity,
)

if TYPE_CHECKING:
    from toolchain.runtime.pictures import SavedPictures

trust_option = click.option(
    "--trust",
    type=click.Path(path_type=Path),
    metavar="PUBLIC.pem",
    help="Refuse a bundle that this key did not sign.  [default: $DIFFBUILD_TRUST]",
)


@click.command(
    epilog=examples(
        'diffbuild generate bundle "a lighthouse at dusk" --seed 0 --output a.png',
        'diffbuild generate bundle "a red barn" --steps 30 --scheduler dpm++2m:karras --guidance 6',
        'diffbuild generate bundle "one" "two" --size 512x768 --output pair.png    # pair-1.png, pair-2.png',
        'diffbuild generate bundle "a red barn in snow" --image barn.png --strength 0.5',
    )
)
@bundle_argument
@click.argument("prompts", metavar="PROMPT...", nargs=-1, required=True)
@click.option("--prompt-2", metavar="TEXT", help="For the second text encoder.  [default: the prompt]")
@click.option("--prompt-3", metavar="TEXT", help="For the third text encoder.  [default: the prompt]")
@click.option("--negative", "negative_prompt", metavar="TEXT", help="What the pictures should not show.")
@click.option("--negative-2", "negative_prompt_2", metavar="TEXT", help="The same for the second text encoder.")
@click.option("--negative-3", "negative_prompt_3", metavar="TEXT", help="The same for the third text encoder.")
@click.option("--seed", type=click.IntRange(0, 2**64 - 1), help="Of the first picture, counting up.  [default: random]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the recipe's]")
@click.option("--scheduler", metavar="NAME", help="Such as euler or dpm++2m:karras.  [default: the recipe's]")
@click.option(
    "--timesteps", type=numbers, metavar="N,N,...", help="In place of --steps, for schedulers that take them."
)
@click.option("--sigmas", type=numbers, metavar="X,X,...", help="In place of --steps, where a scheduler takes them.")
@click.option("--guidance", type=float, help="Classifier-free guidance scale.  [default: the recipe's]")
@click.option("--guidance-rescale", type=click.FloatRange(0, 1), help="Against overexposure, from 0 to 1.")
@click.option("--true-cfg", type=click.FloatRange(0), help="Classifier-free guidance scale of FLUX.")
@click.option("--clip-skip", type=click.IntRange(0), help="Layers of the CLIP text encoders to leave out.")
@click.option("--size", type=size, metavar="HEIGHTxWIDTH", help="One of the built sizes.  [default: the first]")
@click.option("--aspect", type=aspect, metavar="WIDTH:HEIGHT", help="The built size that comes nearest, such as 16:9.")
@click.option("--crop", is_flag=True, help="Cut --size out of the middle of the nearest larger built size.")
@click.option(
    "--image",
    type=click.Path(path_type=Path),
    multiple=True,
    callback=lambda ctx, option, paths: list(paths) or None,
    help="Start from it; one for all or for each.",
)
@click.option("--strength", type=float, help="How much of --image is drawn anew, above 0 and at most 1.")
@click.option("--original-size", type=size, metavar="HEIGHTxWIDTH", help="SDXL's micro-conditioning.")
@click.option("--crop-top-left", type=position, metavar="TOPxLEFT", help="SDXL's micro-conditioning.")
@click.option("--target-size", type=size, metavar="HEIGHTxWIDTH", help="SDXL's micro-conditioning.")
@click.option(
    "--output",
    "-o",
    type=click.Path(path_type=Path),
    metavar="FILE.png",
    help="Several pictures become FILE-1.png and so on.  [default: diffbuild-SEED.png]",
)
@click.option("--no-verify", is_flag=True, help="Trust the bundle's files without comparing their sha256.")
@trust_option
@json_option
@verbosity
def generate(
    bundle: Path,
    prompts: tuple[str, ...],
    output: Path | None,
    no_verify: bool,
    trust: Path | None,
    as_json: bool,
    **options: Any,
) -> None:
    """Draw a picture for each PROMPT with a bundle.

    The same seed gives the same picture. Prompt, seed and settings are written into the PNG as text.
    """
    with progress.evaluations() as shown:
        drawn = api.generate(bundle, prompts, output, verify=not no_verify, trust=trust, progress=shown, **options)
    document = {"images": drawn.images, "load_ms": drawn.load_ms, "timings": vars(drawn.timings)}
    answer(as_json, lambda: document, lambda: generate_lines(drawn))


def generate_lines(drawn: SavedPictures) -> Iterator[str]:
    """What `generate` prints: where the pictures are, and where the time went."""
    timings = drawn.timings
    for image in drawn.images:
        yield f"{image['path']}  seed {image['seed']}"
    steps = len(timings.steps_ms)
    each = f" ({timings.denoise_ms / steps:.1f} ms each)" if steps else ""
    yield (
        f"loaded in {drawn.load_ms / 1e3:.2f} s, generated in {timings.total_ms / 1e3:.2f} s: "
        + (f"compiling the sampler table {timings.table_ms:.0f} ms, " if timings.table_ms else "")
        + f"text {timings.text_ms:.0f} ms, "
        f"{steps} steps {timings.denoise_ms:.0f} ms{each}, decoding {timings.decode_ms:.0f} ms"
    )
