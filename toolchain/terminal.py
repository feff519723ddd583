"""Text for people: colours where a terminal shows them, lines and tables as wide as it is.

Output that is piped or written to a file has neither colours nor wrapped lines: one record per line.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

import click

GOOD, BAD, DOUBTFUL, TODO = {"fg": "green"}, {"fg": "red", "bold": True}, {"fg": "yellow"}, {"fg": "cyan"}
STYLES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("hit", "built", "passed", "works", "yes"), GOOD),
    **dict.fromkeys(("error", "failed", "FAILED", "damaged", "cannot run", "no"), BAD),
    **dict.fromkeys(("warning", "miss", "builds here"), DOUBTFUL),
    **dict.fromkeys(("hint", "next"), TODO),
}
"""Words at the beginning of a line or a table cell, before a colon, a comma or the cell's end; or at the end of the
line of a step, before its time."""
PAINTED = re.compile(rf"(?m)(^\s*|\s\s|\.\.\. )({'|'.join(STYLES)})(?=[:,]|\s\s|$|\s[\d.]+\ss$)")
COMMANDS = re.compile(r"\s*(next|hint): ")
"""Lines with a command to copy, which are never wrapped."""
UNBROKEN = "\N{NO-BREAK SPACE}"
NARROWEST = 24
"""In characters: running text that has less room is put below its row."""


def echo(text: str, *, err: bool = False) -> None:
    """Prints a text, without its colours where there is no terminal, or with NO_COLOR or TERM=dumb."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    click.echo(text, err=err, color=False if plain else None)


def width(*, err: bool = False) -> int | None:
    """Columns of the terminal, or $COLUMNS; None for a file or a pipe."""
    given = os.environ.get("COLUMNS", "")
    if not (given.isdecimal() or (sys.stderr if err else sys.stdout).isatty()):
        return None
    return max(shutil.get_terminal_size().columns, 40)


def lines(texts: Iterator[str] | Sequence[str], *, err: bool = False) -> None:
    """Prints lines, wrapped at the width of the terminal; long words and commands stay whole."""
    columns = width(err=err)
    echo("\n".join(painted(fitted(text, columns)) for text in texts), err=err)


def fitted(line: str, columns: int | None) -> str:
    """A line wrapped between words, its continuation indented by two more; commands stay whole."""
    if columns is None or len(line) <= columns or COMMANDS.match(line):
        return line
    indent = line[: len(line) - len(line.lstrip())]
    return "\n".join(_wrapped(line.strip(), columns, indent, f"{indent}  "))


def table(
    rows: Sequence[Sequence[str]], *, head: Sequence[str] | None = None, indent: str = "  ", columns: int | None = None
) -> Iterator[str]:
    """The lines of a table, its columns as wide as their widest entry; the last column is running text.

    Where the terminal is too narrow, the last column is wrapped, or each row becomes a paragraph: its first entry, and
    the others after their column heads.
    """
    columns = columns or width()
    every = [*([head] if head else []), *rows]
    widths = [max(map(len, column)) for column in zip(*(row[:-1] for row in every), strict=True)]
    left = len(indent) + sum(widths) + 2 * len(widths)
    words = [len(word) for row in every for word in row[-1].split()]
    if columns is None or left + max((len(row[-1]) for row in every), default=0) <= columns:
        room: int | None = None
    elif columns - left >= max(NARROWEST, *words):
        room = columns - left
    else:
        for row in rows:
            yield from _paragraph(row, head, indent, columns)
        return
    for row in every:
        first, *more = [row[-1]] if room is None else _wrapped(row[-1], room) or [""]
        padded = [text.ljust(size) for text, size in zip(row, widths, strict=False)]
        yield (indent + "  ".join([*padded, first])).rstrip()
        yield from (" " * left + text for text in more)


def _paragraph(row: Sequence[str], head: Sequence[str] | None, indent: str, columns: int) -> Iterator[str]:
    if head is None:
        first, rest = row[:-1], row[-1:]
    else:
        # A verdict has no head: it stands beside what it is about.
        first = [row[0], *(cell for cell, name in zip(row[1:], head[1:], strict=True) if not name)]
        rest = [f"{name} {cell}" for cell, name in zip(row[1:], head[1:], strict=True) if name and cell]
    if any(first):
        yield (indent + "  ".join(first)).rstrip()
    below = f"{indent}    "
    whole = [part if len(part) > NARROWEST else part.replace(" ", UNBROKEN) for part in rest]
    yield from (line.replace(UNBROKEN, " ") for line in _wrapped(", ".join(whole), columns, below, below))


def _wrapped(text: str, columns: int, first: str = "", others: str = "") -> list[str]:
    return textwrap.wrap(
        text, columns, initial_indent=first, subsequent_indent=others, break_long_words=False, break_on_hyphens=False
    )


def painted(text: str) -> str:
    """The text with verdicts, hits, misses and errors in colour."""
    return PAINTED.sub(lambda match: match[1] + click.style(match[2], **STYLES[match[2]]), text)
