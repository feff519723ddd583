"""The README is executed: its commands parse, its recipe reference is complete, its numbers are those of the runs."""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path

import click
import pytest

from toolchain.cli.main import cli
from toolchain.recipe import Check, ComponentRecipe, Recipe, Sampling, Tolerance, load_recipe
from toolchain.recipe.options import OnnxRuntimeCudaOptions, OnnxRuntimeOptions, TensorRtOptions, TensorRtRtxOptions

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
sys.path.insert(0, str(ROOT / "benchmarks"))


def commands() -> list[str]:
    lines = [*README.splitlines(), *(ROOT / "Makefile").read_text().splitlines()]
    found = [re.search(r"^\s+(?:\$\(BIN\)/)?diffbuild +(.*)$", line) for line in lines]
    return [match[1] for match in found if match]


def parse(group: click.Group, arguments: list[str]) -> None:
    command = group.commands[arguments[0]]
    if isinstance(command, click.Group):
        parse(command, arguments[1:])
    else:
        command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("line", commands())
def test_commands_of_the_readme_parse(line: str) -> None:
    parse(cli, shlex.split(line.replace("$(", "").replace(")", ""), comments=True))


def test_every_command_is_in_the_readme() -> None:
    shown = {line.split()[0] for line in commands()} | set(re.findall(r"`diffbuild (\w+)", README))
    assert set(cli.commands) <= shown | {"completion"}


KINDS = [
    Recipe,
    ComponentRecipe,
    Sampling,
    OnnxRuntimeOptions,
    OnnxRuntimeCudaOptions,
    TensorRtOptions,
    TensorRtRtxOptions,
    Check,
    Tolerance,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_key_is_in_the_reference(kind: type) -> None:
    reference = README.split("## Recipes")[1].split("\n## ")[0]
    words = set(re.findall(r"[a-z_0-9]+", "".join(re.findall(r"`[^`]+`", reference))))
    assert {f.name for f in fields(kind)} - {"name"} <= words


def test_the_examples_draw_with_tables_of_the_bundle() -> None:
    """So that they run where diffusers is not."""
    tables = load_recipe(ROOT / "recipes" / "sd15-fp32.toml").sampling.tables
    command = next(line for line in commands() if line.startswith("generate sd15"))
    steps, scheduler = re.findall(r"--(?:steps|scheduler) (\S+)", command)
    assert int(steps) in tables[scheduler]
    called = re.search(r'scheduler="(.+)", steps=(\d+)', README)
    assert called is not None
    assert int(called[2]) in tables[called[1]]


def test_the_numbers_are_those_of_the_runs() -> None:
    from table import BEGIN, END, table

    assert README.split(BEGIN)[1].split(END)[0].strip() == table()


def test_the_repository_speaks_of_the_project_alone() -> None:
    """No path of a developer's machine gets into what users read."""
    found = [*ROOT.glob("*.md"), *(ROOT / "recipes").iterdir(), *(ROOT / "docs").iterdir(), ROOT / ".ci" / "run"]
    for folder in ("toolchain", "benchmarks", "examples"):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")]
    for path in found:
        assert not re.search(r"/work/|/root/|/tmp/", path.read_text()), path
