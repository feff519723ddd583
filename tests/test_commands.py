"""Each command parses, calls `toolchain.api` once and prints: what it asks of a model, it asks once."""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from tests.test_cli import run
from tests.tiny_single_file import write_single_file
from toolchain.builder import open_model, plan
from toolchain.cli.main import cli
from toolchain.store.artifacts import Store


def commands(group: click.Group, path: str = "") -> Iterator[tuple[str, Callable[..., Any]]]:
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from commands(command, f"{path}{name} ")
        elif command.callback is not None:
            yield f"{path}{name}", inspect.unwrap(command.callback)


def calls(source: ast.AST) -> list[str]:
    """The functions of `api` that are called."""
    functions = [node.func for node in ast.walk(source) if isinstance(node, ast.Call)]
    attributes = [f for f in functions if isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name)]
    return [f.attr for f in attributes if isinstance(f.value, ast.Name) and f.value.id == "api"]


@pytest.mark.parametrize(("name", "function"), [pytest.param(*c, id=c[0]) for c in commands(cli)])
def test_a_command_is_one_call(name: str, function: Callable[..., Any]) -> None:
    if name == "completion":  # is click's alone
        return
    tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    assert len(calls(tree)) == 1, calls(tree)
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    body = tree.body[0]
    assert isinstance(body, ast.FunctionDef)
    assert (body.end_lineno or 0) - body.lineno < 20


@pytest.mark.parametrize(
    ("command", "plans"),
    [
        ("plan RECIPE --model MODEL --store STORE", 1),
        ("build RECIPE --model MODEL --store STORE --output OUT/bundle", 1),
        ("export RECIPE --model MODEL --store STORE --output OUT/graphs", 1),
        ("init --model MODEL --backend onnxruntime --output OUT/new.toml", 0),
        ("recipe check RECIPE --model MODEL", 0),
        ("check BUNDLE --model MODEL", 0),
        ("bench BUNDLE --model MODEL --against diffusers", 0),
    ],
    ids=lambda value: str(value).partition(" --")[0],
)
def test_a_model_is_resolved_and_planned_once(
    command: str,
    plans: int,
    monkeypatch: pytest.MonkeyPatch,
    tiny_recipe: Path,
    tiny_model: Path,
    tiny_bundle: Path,
    store: Path,
    tmp_path: Path,
) -> None:
    """A hub would be asked, and every weight file's digest looked up, as often."""
    counts = {"resolve_model": 0, "make_plan": 0}
    for module, name in ((open_model, "resolve_model"), (plan, "make_plan")):
        counted(monkeypatch, module, name, counts)
    report = SimpleNamespace(passed=True, to_json=dict, lines=list)
    monkeypatch.setattr("toolchain.check.compare.compare", lambda *_, **__: report)
    monkeypatch.setattr("toolchain.bench.run.bench", lambda *_, **__: report)
    names = {"RECIPE": tiny_recipe, "MODEL": tiny_model, "BUNDLE": tiny_bundle, "STORE": store, "OUT": tmp_path}
    for name, path in names.items():
        command = command.replace(name, str(path))
    run(*command.split())
    assert counts == {"resolve_model": 1, "make_plan": plans}


@pytest.mark.parametrize("command", ["check", "bench --against diffusers"])
def test_a_single_file_is_converted_in_the_store_of_the_command(
    command: str, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    """Where `build --store` has converted it before, so that no second copy of the weights comes to be elsewhere."""
    path = write_single_file(tiny_model, "sd1", tmp_path / "one.safetensors")
    report = SimpleNamespace(passed=True, to_json=dict, lines=list)
    monkeypatch.setattr("toolchain.check.compare.compare", lambda *_, **__: report)
    monkeypatch.setattr("toolchain.bench.run.bench", lambda *_, **__: report)
    monkeypatch.delenv("DIFFBUILD_STORE", raising=False)
    monkeypatch.chdir(tmp_path)
    run(*command.split(), tiny_bundle, "--model", path, "--config", tiny_model, "--store", tmp_path / "store")
    assert [artifact.stage for artifact in Store(tmp_path / "store").artifacts()] == ["model"]
    assert not (tmp_path / "artifacts").exists()


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str, counts: dict[str, int]) -> None:
    plain = getattr(module, name)

    def count(*args: Any, **options: Any) -> Any:
        counts[name] += 1
        return plain(*args, **options)

    monkeypatch.setattr(module, name, count)
