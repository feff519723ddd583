"""The one JSON document of a command, and errors on stderr."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from toolchain.errors import DiffbuildError, GateError
from toolchain.store.plain_json import encode
from toolchain.terminal import lines

SCHEMA = 1
"""Of every JSON document. Raised when a field goes or changes its meaning, not when one is added."""


def print_document(data: Mapping[str, Any]) -> None:
    """Prints the JSON document of a command, its schema first. See `toolchain.store.plain_json` for its numbers."""
    fields = {key: value for key, value in data.items() if key != "schema"}
    click.echo(encode({"schema": SCHEMA, **fields}))


def print_error(error: DiffbuildError, as_json: bool) -> None:
    """Prints an error on stderr and, with `as_json`, as a document on stdout."""
    lines(f"error: {error}".splitlines(), err=True)
    if as_json:
        gate = {"gate": error.gate} if isinstance(error, GateError) else {}
        print_document({"error": error_json(error), **gate})


def error_json(error: DiffbuildError) -> dict[str, str | None]:
    """The parts of an error's message; None where it has none."""
    parts = {name: getattr(error, name) for name in ("what", "where", "expected", "got", "hint")}
    return {name: None if part is None else str(part) for name, part in parts.items()}
