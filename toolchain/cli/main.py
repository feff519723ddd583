"""The command line: parse, call, print.

Importing this module imports click and nothing heavy: each command imports what it needs, so that help and completion
answer at once.
"""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import click

from toolchain.cli import output as report
from toolchain.cli import pictures, progress
from toolchain.cli.cache import cache
from toolchain.cli.console import (
    GATE_FAILED,
    CommandLine,
    answer,
    aspect,
    bundle_argument,
    examples,
    json_option,
    model_option,
    numbers,
    origin_options,
    place,
    recipe_argument,
    size,
    store_option,
    verbosity,
)
from toolchain.cli.recipes import init, recipe_group, recipes
from toolchain.cli.trace import trace
from toolchain.errors import UsageError

trust_option = click.option(
    "--trust",
    type=click.Path(path_type=Path),
    metavar="PUBLIC.pem",
    help="Refuse a bundle that this key did not sign.  [default: $DIFFBUILD_TRUST]",
)
new_file = click.Path(dir_okay=False, path_type=Path)


@click.group(
    cls=CommandLine,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog=examples(
        "diffbuild doctor",
        "diffbuild build sd15-fp32 --model owner/name --output bundle",
        'diffbuild generate bundle "a lighthouse at dusk" --seed 0 --output a.png',
        "diffbuild check bundle --model owner/name",
    )
    + "\n\n\b\nExit codes: 0 done, 1 could not, 2 wrong usage, 3 done but a gate failed, 130 interrupted.",
)
@click.version_option(package_name="diffbuild", prog_name="diffbuild")
@verbosity
def cli() -> None:
    """Compile diffusion models ahead of time.

    A recipe and a diffusers model become a bundle: engines for one machine and a list of sizes. A bundle draws pictures
    without torch and diffusers, and `check` proves that it still is the same model.
    """


for command in (cache, init, recipe_group, recipes, trace):
    cli.add_command(command)


@cli.command(epilog=examples("diffbuild plan sd15-fp32 --model owner/name"))
@recipe_argument
@model_option
@origin_options
@store_option
@json_option
@verbosity
def plan(recipe: Path, model: str, store: Path | None, as_json: bool, **origin: Any) -> None:
    """Show what a build would do, and build nothing.

    Each step is a hit, which is in the store, or a miss, with the fields that changed since it was last built.
    """
    from toolchain.api import plan_build

    planned = plan_build(recipe, model, **origin, store=store)
    answer(as_json, lambda: report.plan_json(planned), lambda: report.plan_lines(planned))


@cli.command(
    epilog=examples(
        "diffbuild build sd15-fp32 --model owner/name --output bundle",
        "diffbuild build sd15-fp32 --model ./model --output bundle --store /data/store",
    )
)
@recipe_argument
@model_option
@click.option(
    "--output", "-o", required=True, type=click.Path(path_type=Path), metavar="BUNDLE", help="The new bundle."
)
@origin_options
@store_option
@json_option
@verbosity
def build(recipe: Path, model: str, output: Path, store: Path | None, as_json: bool, **origin: Any) -> None:
    """Build a bundle from a recipe and a model.

    Builds what the store does not hold yet. After an error or an interruption the same command goes on where it
    stopped; a second run is all hits. An older bundle at --output is replaced only when all went well.
    """
    from toolchain.api import plan_build
    from toolchain.builder.assemble import assemble, check_output

    check_output(output)
    started = time.perf_counter()
    planned = plan_build(recipe, model, **origin, store=store)
    with progress.steps(len(planned.steps)) as shown:
        bundle = assemble(planned, output, shown, shown.within)
    result = (bundle, shown.finished, time.perf_counter() - started)
    answer(as_json, lambda: report.build_json(*result), lambda: report.build_lines(*result))


@cli.command(epilog=examples("diffbuild export sd15-fp32 --model ./model --output graphs"))
@recipe_argument
@model_option
@click.option("--output", "-o", required=True, type=click.Path(path_type=Path), metavar="DIR", help="The new folder.")
@origin_options
@store_option
@json_option
@verbosity
def export(recipe: Path, model: str, output: Path, store: Path | None, as_json: bool, **origin: Any) -> None:
    """Write the ONNX graphs alone, without weights.

    Needs the model's config files and nothing else. Beside each COMPONENT-BUCKET.onnx lies a .weights.json: which
    tensor of the checkpoint each initializer is.
    """
    from toolchain.api import export_graphs, plan_build
    from toolchain.recipe import load_recipe

    loaded = load_recipe(recipe)
    planned = plan_build(loaded, model, **origin, store=store, graphs_only=True)
    with progress.steps(len(planned.steps)) as shown:
        graphs = export_graphs(loaded, model, output, **origin, store=store, progress=shown)
    names = [str(graph) for graph in graphs]
    answer(as_json, lambda: {"output": str(output), "graphs": names}, lambda: names)


@cli.command(
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
@click.option("--image", type=click.Path(path_type=Path), multiple=True, help="Start from it; one for all or for each.")
@click.option("--strength", type=float, help="How much of --image is drawn anew, above 0 and at most 1.")
@click.option("--original-size", type=size, metavar="HEIGHTxWIDTH", help="SDXL's micro-conditioning.")
@click.option("--crop-top-left", type=place, metavar="TOPxLEFT", help="SDXL's micro-conditioning.")
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
    bundle: Path, output: Path | None, no_verify: bool, trust: Path | None, as_json: bool, **request: Any
) -> None:
    """Draw a picture for each PROMPT with a bundle.

    The same seed gives the same picture. Prompt, seed and settings are written into the PNG as text.
    """
    from toolchain.runtime.pipeline import load

    pictures.check_picture_output(output)
    started = time.perf_counter()
    with closing(load(bundle, verify=not no_verify, trust=trust, warm_up=False, open_buckets=1)) as pipe:
        load_ms = (time.perf_counter() - started) * 1e3
        with progress.evaluations() as shown:
            drawn = pictures.draw(pipe, request, shown)
    images = pictures.save(drawn, output)
    document = {"images": images, "load_ms": load_ms, "timings": vars(drawn.result.timings)}
    answer(as_json, lambda: document, lambda: report.generate_lines(images, drawn.result.timings, load_ms))


@cli.command(
    epilog=examples(
        "diffbuild check bundle --model owner/name --report check.json",
        "diffbuild check bundle --model owner/name --html check.html",
    )
)
@bundle_argument
@model_option
@origin_options
@click.option("--report", "target", type=new_file, metavar="FILE.json", help="Also write the report.")
@click.option("--html", "page", type=new_file, metavar="FILE.html", help="Also write a page with pictures and charts.")
@json_option
@verbosity
def check(bundle: Path, model: str, target: Path | None, page: Path | None, as_json: bool, **origin: Any) -> None:
    """Compare a bundle with the model that it was built from.

    Exit code 3 when a tolerance of the recipe is missed.
    """
    from toolchain.api import check_bundle
    from toolchain.bundle.bundle import read_bundle
    from toolchain.check.page import save_page

    pictures.check_output(target)
    pictures.check_output(page)
    if target is not None and page is not None and target.resolve() == page.resolve():
        raise UsageError("--report and --html name the same file", where=page, expected="two files")
    with progress.working(f"comparing {bundle} with {model}") as say:
        compared = check_bundle(bundle, model, **origin, progress=say)
    if target is not None:
        compared.save(target)
    if page is not None:
        save_page(page, compared, read_bundle(bundle))
    answer(as_json, compared.to_json, compared.lines)
    raise click.exceptions.Exit(0 if compared.passed else GATE_FAILED)


@cli.command(
    epilog=examples(
        "diffbuild bench bundle --repeats 10",
        "diffbuild bench bundle --model owner/name --against diffusers --against compile --html bench.html",
    )
)
@bundle_argument
@click.option("--model", metavar="DIR_OR_HUB_ID", help="The model that the bundle was built from, for --against.")
@origin_options
@click.option(
    "--against", multiple=True, type=click.Choice(["diffusers", "compile", "openvino"]), help="Also measure, in turn."
)
@click.option("--repeats", type=click.IntRange(1), default=5, show_default=True, help="Rounds.")
@click.option("--prompt", metavar="TEXT", help="What to draw.  [default: the recipe's first]")
@click.option("--steps", type=click.IntRange(1), help="Denoising steps.  [default: the recipe's]")
@click.option("--batch", type=click.IntRange(1), default=1, show_default=True, help="Pictures of a call.")
@click.option("--size", type=size, metavar="HEIGHTxWIDTH", help="One of the built sizes.  [default: the first]")
@click.option("--sweep", multiple=True, type=click.Choice(["steps", "batch", "size"]), help="Also show how cost grows.")
@click.option("--html", "target", type=click.Path(path_type=Path), metavar="FILE.html", help="Also write a page.")
@json_option
@verbosity
def bench(bundle: Path, target: Path | None, as_json: bool, **wanted: Any) -> None:
    """Measure where the time of a picture goes, and how long others take for the same one.

    Others are diffusers, diffusers with torch.compile, and OpenVINO with the graphs that the bundle was built from.
    Every contender is a process of its own; they draw in turn, so that the machine's drift hits all alike.
    """
    from toolchain.bench.page import page
    from toolchain.bench.run import measure
    from toolchain.store.files import write_atomic

    pictures.check_output(target)
    with progress.working(f"measuring {bundle}") as say:
        measured = measure(bundle, say, **wanted)
    if target is not None:
        write_atomic(target, page(measured).encode())
    answer(as_json, measured.to_json, measured.lines)


@cli.command(epilog=examples("diffbuild inspect bundle --verify", "diffbuild inspect bundle --json"))
@bundle_argument
@click.option("--verify", is_flag=True, help="Compare every file with its sha256.")
@json_option
@verbosity
def inspect(bundle: Path, verify: bool, as_json: bool) -> None:
    """Show what a bundle holds, and whether it can run here."""
    from toolchain.bundle.bundle import read_bundle
    from toolchain.engines.registry import backend_of

    found = read_bundle(bundle)
    if verify:
        with progress.working("comparing digests"):
            found.verify()
    backend = backend_of(found.backend)
    refused = backend.available() or backend.refuse(found.device, found.recipe.to_json()[found.backend])
    if refused and (command := backend.install(found.device)):
        refused += f"; {command}"
    answer(
        as_json,
        lambda: report.bundle_json(found, refused, verify),
        lambda: report.bundle_lines(found, refused, verify),
    )


@cli.command(epilog=examples("diffbuild sign bundle --key private.pem"))
@bundle_argument
@click.option(
    "--key", required=True, type=click.Path(path_type=Path), metavar="PRIVATE.pem", help="An Ed25519 private key."
)
@json_option
@verbosity
def sign(bundle: Path, key: Path, as_json: bool) -> None:
    """Sign a bundle, so that others can tell who built it.

    Compares every file with its sha256 first. The signature lies in the bundle, as bundle.sig; a build that changes the
    bundle drops it. The password of an encrypted key is $DIFFBUILD_KEY_PASSWORD.
    """
    from toolchain.bundle.signing import sign_bundle

    with progress.working("comparing digests"):
        signature = sign_bundle(bundle, key)
    answer(
        as_json, lambda: report.sign_json(bundle, signature), lambda: [f"{bundle}: signed by the key {signature.key}"]
    )


@cli.command(epilog=examples("diffbuild verify bundle", "diffbuild verify bundle --key public.pem"))
@bundle_argument
@click.option(
    "--key",
    type=click.Path(path_type=Path),
    metavar="PUBLIC.pem",
    help="Whose signature it must be.  [default: $DIFFBUILD_TRUST, or nobody's]",
)
@json_option
@verbosity
def verify(bundle: Path, key: Path | None, as_json: bool) -> None:
    """Compare every file of a bundle with its sha256, and with --key the signature.

    Exit code 3 when something is not as it was built, or not as that key signed it.
    """
    from toolchain.bundle.signing import verify_bundle

    with progress.working("comparing digests"):
        verdict = verify_bundle(bundle, key)
    answer(as_json, lambda: report.verdict_json(verdict), lambda: report.verdict_lines(verdict))
    raise click.exceptions.Exit(GATE_FAILED if verdict.problems else 0)


@cli.command(epilog=examples("diffbuild doctor", "diffbuild doctor --json"))
@store_option
@json_option
@verbosity
@click.pass_context
def doctor(ctx: click.Context, store: Path | None, as_json: bool) -> None:
    """Show what can run on this machine, and why not.

    Lists backends, library versions, CPU, GPU and the disk of the store. Exit code 0 when
    one backend at least works, 1 when none does.
    """
    from toolchain.cli.doctor import doctor_lines
    from toolchain.engines.machine import examine
    from toolchain.store.artifacts import default_store

    facts = examine(store or default_store())
    answer(as_json, lambda: facts, lambda: doctor_lines(facts))
    ctx.exit(0 if facts["works"] else 1)


@cli.command(
    epilog=examples(
        "diffbuild completion bash >> ~/.bashrc",
        "diffbuild completion zsh >> ~/.zshrc",
        "diffbuild completion fish > ~/.config/fish/completions/diffbuild.fish",
    )
)
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in SHELL."""
    from click.shell_completion import get_completion_class

    script = get_completion_class(shell)
    assert script is not None
    click.echo(script(cli, {}, "diffbuild", "_DIFFBUILD_COMPLETE").source())


def main() -> None:
    """The entry point of `diffbuild`."""
    cli(prog_name="diffbuild")


if __name__ == "__main__":
    main()
