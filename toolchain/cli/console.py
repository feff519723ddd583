"""What all commands share: errors that become messages and exit codes, -v and -q, the log, --size and the like.

Exit codes: 0 done, 1 could not, 2 wrong usage, 3 done but a gate failed, 130 interrupted.
"""

from __future__ import annotations

import errno
import logging
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import click

from toolchain import terminal
from toolchain.cli import progress
from toolchain.cli.document import print_document, print_error
from toolchain.errors import DiffbuildError, UsageError

log = logging.getLogger("toolchain")

GATE_FAILED = 3
INTERRUPTED = 130
LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}
BUILD_PACKAGES = (
    "accelerate",
    "diffusers",
    "huggingface_hub",
    "ml_dtypes",
    "onnx",
    "onnx_ir",
    "onnxscript",
    "polygraphy",
    "scipy",
    "skimage",
    "torch",
    "transformers",
)
"""Modules that `pip install diffbuild[build]` brings."""

OPTIONS_OF_DIFFUSERS = {
    "--num-inference-steps": "--steps",
    "--height": "--size HEIGHTxWIDTH",
    "--width": "--size HEIGHTxWIDTH",
    "--generator": "--seed",
    "--num-images-per-prompt": "the prompt as often as pictures are wanted",
}
"""Options of the diffusers pipelines whose names are too far from ours for click to suggest ours."""

Command = TypeVar("Command", bound=Callable[..., Any])


def size(text: str) -> tuple[int, int]:
    """HEIGHTxWIDTH in pixels -> (height, width)."""
    return _pair(text, "HEIGHTxWIDTH in pixels, such as 512x768.")


def position(text: str) -> tuple[int, int]:
    """TOPxLEFT in pixels -> (top, left)."""
    return _pair(text, "TOPxLEFT in pixels, such as 0x0.")


def _pair(text: str, form: str) -> tuple[int, int]:
    first, _, second = text.partition("x")
    if not (first.isascii() and first.isdigit() and second.isascii() and second.isdigit()):
        raise click.BadParameter(f"{text!r} is not {form}")
    return int(first), int(second)


def numbers(text: str) -> list[float]:
    """X,X,... -> the numbers."""
    try:
        return [float(x) for x in text.split(",")]
    except ValueError:
        form = "a list of numbers with commas between them, such as 999,650,300."
        raise click.BadParameter(f"{text!r} is not {form}") from None


def aspect(text: str) -> float:
    """WIDTH:HEIGHT -> width / height."""
    width, _, height = text.partition(":")
    try:
        ratio = float(width) / float(height)
    except (ValueError, ZeroDivisionError):
        ratio = 0.0
    if not 0 < ratio < float("inf"):
        raise click.BadParameter(f"{text!r} is not WIDTH:HEIGHT, such as 16:9.")
    return ratio


class CommandLine(click.Group):
    """The group of all commands, which ends the process with the exit codes above."""

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Runs the command line and ends the process."""
        given = kwargs.get("args", args[0] if args else None)
        arguments = list(sys.argv[1:] if given is None else given)
        kwargs["standalone_mode"] = False
        sys.exit(_exit_code(lambda: super(CommandLine, self).main(*args, **kwargs), "--json" in arguments))

    def invoke(self, ctx: click.Context) -> Any:
        """Runs a command; an interruption becomes one line and its exit code."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            resumes = ctx.invoked_subcommand in ("build", "export", "calibrate", "tune")
            terminal.echo("interrupted" + ("; the same command goes on from here" if resumes else ""), err=True)
            raise click.exceptions.Exit(INTERRUPTED) from None


def _exit_code(run: Callable[[], Any], as_json: bool) -> int:
    """Runs a command and prints the error that it raises, without a traceback unless debugging."""
    try:
        _start_logging()
        return run() or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        return error.exit_code
    except Exception as error:
        log.debug("the traceback of the error below", exc_info=error)
        explained = _explain(error)
        print_error(explained, as_json)
        return explained.exit_code


def _explain(error: Exception) -> DiffbuildError:
    """Any error as one that says what to do next."""
    if isinstance(error, DiffbuildError):
        return error
    if isinstance(error, click.ClickException):
        ctx = getattr(error, "ctx", None)
        hint = f"{ctx.command_path} --help" if ctx else "diffbuild --help"
        ours = OPTIONS_OF_DIFFUSERS.get(getattr(error, "option_name", "").replace("_", "-"))
        hint = f"did you mean {ours}? {hint}" if ours else hint
        usage = " ".join(ctx.get_usage().split()).removeprefix("Usage: ") if ctx else None
        return UsageError(error.format_message(), expected=usage, hint=hint)
    if isinstance(error, ModuleNotFoundError) and str(error.name).partition(".")[0] in BUILD_PACKAGES:
        return DiffbuildError(f"this needs {error.name}, which is not installed", hint="pip install 'diffbuild[build]'")
    if isinstance(error, OSError) and error.errno and error.filename is not None:
        code = errno.errorcode.get(error.errno)
        return DiffbuildError(f"the system refused: {error.strerror}", where=error.filename, got=code)
    said = " ".join(str(error).split())
    bug = "this is a bug; -v or DIFFBUILD_LOG=debug shows the traceback to report"
    return DiffbuildError(f"{type(error).__name__}: {said} ({bug})")


def _start_logging() -> None:
    name = os.environ.get("DIFFBUILD_LOG") or "warning"
    progress.start_logging(LEVELS.get(name.lower(), logging.WARNING))
    if name.lower() not in LEVELS:
        raise UsageError("DIFFBUILD_LOG is not a log level", expected=" or ".join(LEVELS), got=name)


def _set_level(_: click.Context, param: click.Parameter, given: bool) -> None:
    if given:
        log.setLevel(logging.DEBUG if param.name == "verbose" else logging.ERROR)


def verbosity(command: Command) -> Command:
    """-v and -q, before and after the command's name."""
    for name, flag, text in (
        ("quiet", "-q", "No progress and no warnings."),
        ("verbose", "-v", "Log what happens, and tracebacks."),
    ):
        option = click.option(f"--{name}", flag, is_flag=True, expose_value=False, callback=_set_level, help=text)
        command = option(command)
    return command


def examples(*commands: str) -> str:
    """An epilog that keeps its lines."""
    return "\b\nExamples:\n" + "\n".join(f"  {command}" for command in commands)


def origin_options(command: Command) -> Command:
    """The options that say more about --model."""
    revision = click.option("--revision", metavar="REVISION", help="Branch, tag or commit of a hub id.")
    config = click.option(
        "--config",
        metavar="DIR_OR_HUB_ID",
        help="Describes the model of a single file.  [default: the hub repository that diffusers takes]",
    )
    return revision(config(command))


recipe_argument = click.argument("recipe", type=click.Path(path_type=Path))
model_option = click.option(
    "--model",
    required=True,
    metavar="DIR_OR_HUB_ID",
    help="A diffusers folder, a .safetensors file, or a hub id such as owner/name.",
)
bundle_argument = click.argument("bundle", type=click.Path(path_type=Path))
store_option = click.option(
    "--store",
    type=click.Path(file_okay=False, path_type=Path),
    help="Where artifacts are kept and found.  [default: $DIFFBUILD_STORE, or ./artifacts]",
)
json_option = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document, and nothing else, on stdout."
)


def answer(as_json: bool, document: Callable[[], Any], text: Callable[[], Any]) -> None:
    """Prints a command's result in the form that was asked for."""
    if as_json:
        print_document(document())
    else:
        terminal.lines(text())
