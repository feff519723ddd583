"""What a terminal is given: colours, and lines and tables that fit it at word boundaries."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from tests.test_cli import run
from toolchain import terminal
from toolchain.cli.main import cli
from toolchain.terminal import fitted, painted, table

WIDTHS = range(60, 201, 7)
RED, GREEN, YELLOW = "\x1b[31m", "\x1b[32m", "\x1b[33m"

REASONS = [
    ["hit", "graph text_encoder any", ""],
    [
        "miss",
        "engine vae_decoder 1x1024x1024",
        'options.optimization: "all" -> "basic", and made from new graph, weights',
    ],
]
MEMORY_HEAD = ["", "weights", "session", "buffers", "activations", "arena", "together"]
MEMORY = [
    ["denoiser 1x1024x1024", "2.6 GB", "11.7 MB", "157.7 kB", "1.7 MB", "3.8 MB", "2.6 GB"],
    ["text", *["9.9 MB"] * 6],
]
VERDICTS_HEAD = ["component", "bucket", "output", "inputs", "worst", ""]
VERDICTS = [["denoiser", "1x64x64", "next_state", "160", "cosine 0.9999993, snr_db 61.2, max_error 0.0007", "FAILED"]]


def words(text: str) -> list[str]:
    return re.findall(r"[^\s,]+", text)


@pytest.mark.parametrize(("rows", "head"), [(REASONS, None), (MEMORY, MEMORY_HEAD), (VERDICTS, VERDICTS_HEAD)])
def test_tables_fit_and_break_no_word(rows: list[list[str]], head: list[str] | None) -> None:
    whole = words(" ".join(cell for row in rows for cell in row))
    for columns in WIDTHS:
        lines = list(table(rows, head=head, columns=columns))
        assert max(map(len, lines)) <= columns, columns
        shown = words(" ".join(lines))
        assert all(shown.count(word) >= whole.count(word) for word in whole), columns


def test_a_table_that_fits_is_a_table() -> None:
    lines = list(table(MEMORY, head=MEMORY_HEAD, columns=100))
    assert [words(line) for line in lines] == [words(" ".join(row)) for row in [MEMORY_HEAD, *MEMORY]]
    assert lines == list(table(MEMORY, head=MEMORY_HEAD)), "what is piped is one row per line"


def test_running_text_goes_on_below_itself() -> None:
    lines = list(table(REASONS, columns=70))
    assert lines[0] == "  hit   graph text_encoder any"
    start = lines[1].index("options.")
    assert len(lines) > 2
    assert all(line[:start].isspace() and not line[start].isspace() for line in lines[2:])


def test_a_table_that_is_too_wide_becomes_paragraphs() -> None:
    assert list(table(MEMORY[:1], head=MEMORY_HEAD, columns=60)) == [
        "  denoiser 1x1024x1024",
        "      weights 2.6 GB, session 11.7 MB, buffers 157.7 kB,",
        "      activations 1.7 MB, arena 3.8 MB, together 2.6 GB",
    ]
    first, *rest = table(VERDICTS, head=VERDICTS_HEAD, columns=60)
    assert first == "  denoiser  FAILED"
    assert "bucket 1x64x64, output next_state" in rest[0]


def test_lines_are_broken_between_words_and_commands_never() -> None:
    long = "  warning: " + "seventeen-letters " * 12
    for columns in WIDTHS:
        parts = fitted(long, columns).splitlines()
        assert max(map(len, parts)) <= columns
        assert words(" ".join(parts)) == words(long)
        assert all(part.startswith("    ") for part in parts[1:])
    command = 'next: diffbuild generate /a/long/path/to/a/bundle "a prompt that is long" --seed 0 --output a.png'
    assert fitted(command, 60) == command
    assert fitted(long, None) == long


@pytest.mark.parametrize(
    ("line", "word", "colour"),
    [
        ("error: no engine", "error", RED),
        ("FAILED: 3 of 9 comparisons", "FAILED", RED),
        ("  denoiser  1x64x64  FAILED", "FAILED", RED),
        ("passed: 9 comparisons", "passed", GREEN),
        ("  hit   graph denoiser", "hit", GREEN),
        ("  miss  graph denoiser   not built yet", "miss", YELLOW),
        ("[3/9] graph denoiser ... built 1.3 s", "built", GREEN),
        ("warning: both are installed", "warning", YELLOW),
        ("backend tensorrt  cannot run: no GPU", "cannot run", RED),
        ("runs here  no: built on another", "no", RED),
    ],
)
def test_what_stands_out(line: str, word: str, colour: str) -> None:
    shown = painted(line)
    assert click.unstyle(shown) == line
    assert re.search(rf"{re.escape(colour)}(\x1b\[1m)?{word}\x1b\[0m", shown)


@pytest.mark.parametrize("line", ["a.png  seed 0", "bundle: no artifacts", "nothing is missing", 'prompt "yes: no"'])
def test_what_does_not(line: str) -> None:
    assert painted(line) == line


def coloured(*arguments: object) -> str:
    """What a terminal that shows colours is given, stderr included."""
    return CliRunner().invoke(cli, [str(a) for a in arguments], color=True).output


@pytest.mark.parametrize(("variable", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_colours_are_left_out_on_request(
    variable: str, value: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    wrong = ("recipe", "check", tmp_path / "none.toml")
    assert f"{RED}\x1b[1merror\x1b[0m: the recipe cannot be read" in coloured(*wrong)
    assert f"{GREEN}works\x1b[0m: kind cpu" in coloured("doctor")
    monkeypatch.setenv(variable, value)
    for arguments in (wrong, ("doctor",)):
        assert "\x1b" not in coloured(*arguments)


def test_an_empty_no_color_asks_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """https://no-color.org: when present and not an empty string."""
    monkeypatch.delenv("TERM", raising=False)
    monkeypatch.setenv("NO_COLOR", "")
    assert GREEN in coloured("doctor")


def test_what_is_piped_has_neither_colours_nor_breaks() -> None:
    assert terminal.width() is None
    text = run("doctor").stdout
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) > 80


@pytest.mark.parametrize("columns", [60, 80, 120, 200])
@pytest.mark.parametrize("command", [("recipes",), ("doctor",), ("recipe", "check", "sdxl-fp32"), ("cache", "ls")])
def test_commands_fit(command: tuple[str, ...], columns: int, monkeypatch: pytest.MonkeyPatch, store: Path) -> None:
    monkeypatch.setenv("DIFFBUILD_STORE", str(store))
    whole = set(words(run(*command).stdout))
    monkeypatch.setenv("COLUMNS", str(columns))
    lines = run(*command).stdout.splitlines()
    too_wide = [line for line in lines if len(line) > columns and not line.startswith(("next:", "hint:"))]
    assert all(len(line.split()) == 1 for line in too_wide), too_wide
    ages = re.compile(r"\d+|min|h|d|just|now|ago|GB|free|store")  # of an artifact and of the disk, which go on
    heads = {"recipe", "family", "backend", "runs", "on", "precision", "stage", "subject", "size", "used", "key"}
    assert {word for word in whole - heads if not ages.fullmatch(word)} <= set(words(" ".join(lines)))


def test_verbose_shows_the_stages(tiny_bundle: Path, tmp_path: Path) -> None:
    said = run("generate", tiny_bundle, "a red circle", "-o", tmp_path / "a.png", "-v").stderr
    stages = re.findall(r"^debug: [\d.]+ s: (\w+)", said, re.MULTILINE)
    assert [s for s in stages if s in ("comparing", "opening", "text", "denoising", "decoding")] == [
        *("comparing", "opening", "text", "denoising", "decoding")
    ]
    assert "debug" not in run("generate", tiny_bundle, "a red circle", "-o", tmp_path / "a.png").stderr
