"""The group of all commands, and the entry point of `diffbuild`.

Each command parses, calls `toolchain.api` once and prints. Importing this module imports click and nothing heavy, so
that help and completion answer at once.
"""

from __future__ import annotations

import click

from toolchain.cli.build import build, export, plan
from toolchain.cli.cache import cache
from toolchain.cli.calibrate import calibrate
from toolchain.cli.check import bench, check
from toolchain.cli.console import CommandLine, examples, verbosity
from toolchain.cli.doctor import doctor
from toolchain.cli.generate import generate
from toolchain.cli.inspect import inspect
from toolchain.cli.recipes import init, recipe_group, recipes
from toolchain.cli.sign import sign, verify
from toolchain.cli.trace import trace
from toolchain.cli.tune import tune

COMMANDS = (
    *(plan, build, export, calibrate),
    *(generate, check, bench, tune, trace, inspect, sign, verify),
    *(recipes, init, recipe_group),
    *(cache, doctor),
)


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


for command in COMMANDS:
    cli.add_command(command)


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
