"""`diffbuild sign` and `verify`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from toolchain import api
from toolchain.cli import progress
from toolchain.cli.console import GATE_FAILED, answer, bundle_argument, examples, json_option, verbosity
from toolchain.cli.document import error_json

if TYPE_CHECKING:
    from toolchain.bundle.signing import Verdict


@click.command(epilog=examples("diffbuild sign bundle --key private.pem"))
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
    with progress.working("comparing digests"):
        signature = api.sign_bundle(bundle, key)
    document = {"bundle": str(bundle), "key": signature.key}
    answer(as_json, lambda: document, lambda: [f"{bundle}: signed by the key {signature.key}"])


@click.command(epilog=examples("diffbuild verify bundle", "diffbuild verify bundle --key public.pem"))
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

    Exit code 3 when a file has changed since the build, or the signature is not that key's.
    """
    with progress.working("comparing digests"):
        verdict = api.verify_bundle(bundle, key)
    answer(as_json, lambda: verdict_json(verdict), lambda: verdict_lines(verdict))
    raise click.exceptions.Exit(GATE_FAILED if verdict.problems else 0)


def verdict_json(verdict: Verdict) -> dict[str, Any]:
    """The document of `verify`."""
    return {
        "bundle": str(verdict.bundle),
        "files": verdict.files,
        "signed_by": None if verdict.signature is None else verdict.signature.key,
        "compared_with": verdict.compared,
        "problems": [error_json(problem) for problem in verdict.problems],
    }


def verdict_lines(verdict: Verdict) -> Iterator[str]:
    """What `verify` prints."""
    yield from (str(problem) for problem in verdict.problems)
    if verdict.problems:
        return
    yield f"{verdict.bundle}: all {verdict.files} files are unchanged since the build"
    if verdict.signature is None:
        yield "unsigned: who built it is unknown; diffbuild sign signs it"
    elif verdict.compared is None:
        yield f"claims to be signed by the key {verdict.signature.key}, which was not verified (--key does)"
    else:
        yield f"signed by the key {verdict.compared}"
