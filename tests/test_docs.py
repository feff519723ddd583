"""README and docs are executed: commands parse, links resolve, the recipe reference is complete, the numbers agree."""

from __future__ import annotations

import ast
import inspect
import re
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest

import toolchain
from toolchain.cli.main import cli
from toolchain.recipe import Check, ComponentRecipe, Recipe, Sampling, Tolerance, load_recipe
from toolchain.recipe.options import (
    OnnxRuntimeCudaOptions,
    OnnxRuntimeOptions,
    OpenVinoOptions,
    TensorRtOptions,
    TensorRtRtxOptions,
)
from toolchain.runtime.pipeline import Pipeline

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {
    str(path.relative_to(ROOT)): path.read_text()
    for folder in ("", "docs", "artifacts", "benchmarks/gpu_run")
    for path in sorted((ROOT / folder).glob("*.md"))
}
"""Path -> text of every page."""
TEXT = "\n".join(PAGES.values())
sys.path.insert(0, str(ROOT / "benchmarks"))


def commands() -> list[str]:
    lines = [*TEXT.splitlines(), *(ROOT / "Makefile").read_text().splitlines()]
    matches = [re.search(r"^\s+(?:\$\(BIN\)/)?diffbuild +(.*)$", line) for line in lines]
    return [match[1] for match in matches if match]


def parse(group: click.Group, arguments: list[str]) -> None:
    command = group.commands[arguments[0]]
    if isinstance(command, click.Group):
        parse(command, arguments[1:])
    else:
        command.make_context(arguments[0], arguments[1:])


@pytest.mark.parametrize("line", commands())
def test_commands_of_every_page_parse(line: str) -> None:
    parse(cli, shlex.split(line.replace("$(", "").replace(")", ""), comments=True))


@pytest.mark.parametrize("words", sorted(set(re.findall(r"`diffbuild ([a-z][a-z ]*)", TEXT))))
def test_commands_named_in_a_sentence_exist(words: str) -> None:
    group: click.Command = cli
    for word in words.split():
        if isinstance(group, click.Group):
            group = group.commands[word]


def test_every_command_is_on_the_page_of_commands() -> None:
    page = PAGES["docs/command-line.md"]
    rows = "".join(re.findall(r"^\| (.*?) \|", page, flags=re.MULTILINE))
    assert set(cli.commands) <= set(re.findall(r"[a-z]+", "".join(re.findall(r"`[^`]+`", rows))))
    shown = {line.split()[0] for line in commands()} | set(re.findall(r"`diffbuild (\w+)", TEXT))
    assert set(cli.commands) <= shown | {"completion"}


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 150


def anchors(text: str) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES)
def test_every_link_leads_somewhere(page: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[page]):
        if re.match(r"https?://", target):
            continue
        file, _, anchor = target.partition("#")
        path = (ROOT / page).parent / file if file else ROOT / page
        assert path.exists(), target
        assert not anchor or anchor in anchors(path.read_text()), target


def test_every_page_can_be_reached_from_the_readme() -> None:
    assert {page for page in PAGES if page.startswith("docs/")} <= set(re.findall(r"\]\(([^)#]+)", README))


@pytest.mark.parametrize("page", PAGES)
def test_every_file_that_a_page_names_exists(page: str) -> None:
    """Names with a part in capitals stand for any file."""
    code = re.findall(r"`[^`\n]+`|^ {4}.*$", PAGES[page], flags=re.MULTILINE)
    folders = "toolchain|tests|benchmarks|examples|recipes|docs"
    for path in re.findall(rf"(?<![\w/.])(?:{folders})/[\w./-]*", "\n".join(code)):
        assert re.search(r"[A-Z]{3}", path) or (ROOT / path.rstrip(".")).exists(), path


def test_every_room_is_on_the_map() -> None:
    rooms = {path.parent.name for path in (ROOT / "toolchain").glob("*/__init__.py")}
    rows = re.findall(r"^\| `toolchain/(\w+)/` \|", PAGES["docs/how-it-works.md"], flags=re.MULTILINE)
    assert sorted(rows) == sorted(rooms)


def python_blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXT, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("block", python_blocks())
def test_python_of_every_page_calls_what_there_is(block: str) -> None:
    """Its names are public, and its calls have arguments that the function takes."""
    for node in ast.walk(ast.parse(block)):
        if not isinstance(node, ast.Call):
            continue
        function = ast.unparse(node.func)
        if function == "pipe":
            called: Any = Pipeline.__call__
        elif function.startswith("toolchain."):
            assert function.removeprefix("toolchain.") in toolchain.__all__
            called = getattr(toolchain, function.removeprefix("toolchain."))
        else:
            continue
        positional = [None] * (len(node.args) + (function == "pipe"))
        inspect.signature(called).bind(*positional, **{str(keyword.arg): None for keyword in node.keywords})


KINDS = [
    Recipe,
    ComponentRecipe,
    Sampling,
    OnnxRuntimeOptions,
    OnnxRuntimeCudaOptions,
    OpenVinoOptions,
    TensorRtOptions,
    TensorRtRtxOptions,
    Check,
    Tolerance,
]


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_key_is_in_the_reference(kind: type) -> None:
    reference = PAGES["docs/recipes.md"].split("## Every key")[1].split("\n## ")[0]
    words = set(re.findall(r"[a-z_0-9]+", "".join(re.findall(r"`[^`]+`", reference))))
    assert {f.name for f in fields(kind)} - {"name"} <= words


def test_the_messages_that_the_gpu_page_explains_are_those_of_the_source() -> None:
    """By the last four words of each part: a name may stand before them, and a value between the parts."""
    source = "\n".join(path.read_text() for path in (ROOT / "toolchain").rglob("*.py"))
    source = re.sub(r'"\n *f?"', "", source)  # a message over two lines
    page = PAGES["docs/gpu.md"].split("## When something fails")[1]
    messages = re.findall(r"\*([^*]+)\*", page)
    assert len(messages) >= 9
    for part in " ... ".join(messages).replace("\n  ", " ").split("..."):
        words = part.strip(" ,").split()[-4:]
        assert " ".join(words) in source, part


def test_functions_for_a_new_family_exist() -> None:
    page = PAGES["CONTRIBUTING.md"].split("## A new family")[1].split("\n## ")[0]
    files = {path.stem: path.read_text() for path in (ROOT / "toolchain" / "models").glob("*.py")}
    named = [
        (module, name) for module, name in re.findall(r"`([a-z]\w+)\.([a-z]\w+)`", page) if name not in ("py", "json")
    ]
    assert len(named) >= 15
    for module, name in named:
        assert re.search(rf"^def {name}\(", files[module], flags=re.MULTILINE), f"{module}.{name}"


def test_a_new_backend_touches_what_names_the_others() -> None:
    """Every module outside a backend's own folder that names a backend of today is a file of the page."""
    page = PAGES["CONTRIBUTING.md"].split("## A new backend")[1].split("\n## ")[0]
    home = ROOT / "toolchain" / "engines" / "onnxruntime_cuda"
    for path in sorted((ROOT / "toolchain").rglob("*.py")):
        if re.search(r"\bonnxruntime_cuda\b", path.read_text()) and path.parent != home:
            assert str(path.relative_to(ROOT)) in page, path


def test_the_examples_draw_with_tables_of_the_bundle() -> None:
    """So that they run where diffusers is not."""
    tables = load_recipe(ROOT / "recipes" / "sd15-fp32.toml").sampling.tables
    command = next(line for line in commands() if line.startswith("generate sd15"))
    steps, scheduler = re.findall(r"--(?:steps|scheduler) (\S+)", command)
    assert int(steps) in tables[scheduler]
    called = re.search(r'scheduler="(.+)", steps=(\d+)', PAGES["docs/python.md"])
    assert called is not None
    assert int(called[2]) in tables[called[1]]


@pytest.mark.parametrize("page", ["README.md", "docs/measurements.md"])
def test_the_numbers_are_those_of_the_runs(page: str) -> None:
    import table

    _, inside, _ = table.parts(page)
    assert inside == table.PAGES[page][1]()


def test_the_repository_speaks_of_the_project_alone() -> None:
    """No path of a developer's machine gets into what users read."""
    found = [*(ROOT / page for page in PAGES), *(ROOT / "recipes").iterdir(), ROOT / ".ci" / "run"]
    for folder in ("toolchain", "benchmarks", "examples"):
        found += [path for path in (ROOT / folder).rglob("*") if path.suffix in (".py", ".json")]
    for path in found:
        assert not re.search(r"/work/|/root/|/tmp/", path.read_text()), path
