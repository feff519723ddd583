"""The command line: every command once with a real bundle, its exit codes, its JSON and what it must not import."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner, Result
from PIL import Image

import toolchain
import toolchain.api
from tests.manifests import edit_manifest
from toolchain.cli import progress
from toolchain.cli.build import build_lines
from toolchain.cli.console import numbers
from toolchain.cli.main import cli
from toolchain.errors import EngineError
from toolchain.store.artifacts import Store

PROMPT = "a red circle on a white background"
HEAVY = ("torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript")
OPTIONS_FILE = Path(__file__).with_name("cli_options.txt")
UPDATE = "python -m tests.test_cli > tests/cli_options.txt"


def run(*arguments: object, code: int = 0) -> Result:
    result = CliRunner().invoke(cli, [str(a) for a in arguments], prog_name="diffbuild")
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    return result


def run_json(*arguments: object, code: int = 0) -> dict[str, Any]:
    """The command's one JSON document; anything else on stdout fails to parse."""
    document: dict[str, Any] = json.loads(run(*arguments, "--json", code=code).stdout)
    assert document["schema"] == 1
    assert next(iter(document)) == "schema"
    return document


def process(*arguments: object, script: str = "from toolchain.cli.main import main; main()") -> list[str]:
    return [sys.executable, "-c", script, *map(str, arguments)]


def modules_after(*arguments: object) -> set[str]:
    """Top-level modules that a command in a fresh interpreter has imported when it is done."""
    report = "import atexit, sys; atexit.register(lambda: print('MODULES', *sys.modules))"
    script = f"{report}; from toolchain.cli.main import main"
    done = subprocess.run(process(*arguments, script=f"{script}; main()"), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    listed = done.stdout.rpartition("MODULES ")[2]
    return {name.partition(".")[0] for name in listed.split()}


@pytest.fixture
def build_arguments(tiny_recipe: Path, tiny_model: Path, store: Path, tiny_bundle: Path) -> list[object]:
    """The arguments with which the session's bundle was built, but for its place."""
    return [tiny_recipe, "--model", tiny_model, "--store", store]


# --- the interface as it is written down ------------------------------------------------------------------------------


def describe(command: click.Command, path: str) -> Iterator[str]:
    """One line for a command, one for each argument and option, in the order of --help."""
    yield path
    for param in command.params:
        if isinstance(param, click.Argument):
            kind = getattr(param.type, "choices", None)
            yield f"    {param.name}{'...' if param.nargs == -1 else ''}{' ' + '|'.join(kind) if kind else ''}"
        else:
            required = ", required" if param.required else ""
            flag = isinstance(param, click.Option) and param.is_flag
            yield f"    {', '.join(param.opts)}{'' if flag else ' VALUE'}{required}"
    if isinstance(command, click.Group):
        for name in sorted(command.commands):
            yield from describe(command.commands[name], f"{path} {name}")


def test_commands_and_options_are_the_ones_written_down() -> None:
    written = OPTIONS_FILE.read_text().splitlines()
    assert list(describe(cli, "diffbuild")) == written, (
        f"the command line changed. If that is meant, also for those who use it in scripts, run: {UPDATE}"
    )


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    yield path, command
    if isinstance(command, click.Group):
        for name, inner in command.commands.items():
            yield from commands(inner, (*path, name))


@pytest.mark.parametrize("path", [pytest.param(path, id=" ".join(path) or "diffbuild") for path, _ in commands(cli)])
def test_every_help_explains_itself(path: tuple[str, ...]) -> None:
    command = dict(commands(cli))[path]
    text = run(*path, "--help").stdout
    assert "Examples:" in text or path == ("completion",) or "Example" in text
    assert command.help
    for param in command.params:
        if isinstance(param, click.Option):
            assert param.help, f"{path}: {param.opts} has no help"


def test_help_examples_parse() -> None:
    for _, command in commands(cli):
        for line in (command.epilog or "").splitlines():
            if line.startswith("  diffbuild "):
                words = itertools.takewhile(lambda w: w not in (">", ">>"), shlex.split(line, comments=True)[1:])
                name, *rest = words
                found = cli.commands[name]
                if isinstance(found, click.Group):
                    found, rest = found.commands[rest[0]], rest[1:]
                found.make_context(name, rest)


def test_version() -> None:
    assert run("--version").stdout.startswith("diffbuild, version ")


def test_no_command_prints_the_help() -> None:
    assert "Commands:" in run(code=2).output


def test_importing_the_command_line_imports_nothing_heavy() -> None:
    loaded = modules_after("--help")
    assert not loaded & {*HEAVY, "onnxruntime", "numpy", "PIL", "tokenizers", "rich"}


def test_help_is_instant() -> None:
    times = []
    for _ in range(3):
        started = time.perf_counter()
        subprocess.run(process("--help"), capture_output=True, check=True)
        times.append(time.perf_counter() - started)
    print(f"diffbuild --help: {min(times):.3f} s")
    assert min(times) < 0.6  # 0.2 s on an idle machine


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_prints_a_script(shell: str) -> None:
    assert "_DIFFBUILD_COMPLETE" in run("completion", shell).stdout


# --- plan, build, export ----------------------------------------------------------------------------------------------


def test_plan_of_what_is_built_is_all_hits(build_arguments: list[object]) -> None:
    document = run_json("plan", *build_arguments)
    assert document["misses"] == 0
    assert document["hits"] == len(document["steps"]) > 10
    assert set(document["steps"][0]) == {"stage", "subject", "key", "hit", "changed"}
    assert f"{document['hits']} hits, 0 misses" in run("plan", *build_arguments).stdout


def test_plan_after_an_edit_names_the_changed_field(build_arguments: list[object], tmp_path: Path) -> None:
    edited = tmp_path / "tiny.toml"
    edited.write_text(Path(str(build_arguments[0])).read_text() + '\n[onnxruntime]\noptimization = "basic"\n')
    document = run_json("plan", edited, *build_arguments[1:])
    missed = {step["subject"]: step for step in document["steps"] if not step["hit"]}
    assert missed["tiny text_encoder any"]["stage"] == "engine"
    assert 'options.optimization: "all" -> "basic"' in missed["tiny text_encoder any"]["changed"]
    assert all(step["hit"] for step in document["steps"] if step["stage"] in ("graph", "weights", "sampler"))
    text = run("plan", edited, *build_arguments[1:]).stdout
    assert 'options.optimization: "all" -> "basic"' in text
    assert "hit   graph denoiser 1x64x64" in text


def test_plan_with_an_empty_store_is_all_misses(build_arguments: list[object], tmp_path: Path) -> None:
    arguments = [*build_arguments[:3], "--store", tmp_path / "none"]
    assert "not built yet" in run("plan", *arguments).stdout
    assert run_json("plan", *arguments)["hits"] == 0
    assert not (tmp_path / "none" / "graph").exists()


def test_second_build_is_all_hits(build_arguments: list[object], tmp_path: Path) -> None:
    output = tmp_path / "bundle"
    document = run_json("build", *build_arguments, "--output", output)
    assert document["built"] == 0
    assert document["hits"] == len(document["steps"])
    assert document["bundle"] == str(output)
    assert document["buckets"] == ["1x64x64", "2x64x96"]
    again = run("build", *build_arguments, "--output", output)
    print(again.stdout)
    assert f"0 built, {document['hits']} hits" in again.stdout
    assert f"[1/{document['hits']}] tokenizer tokenizer ... hit" in again.stderr
    assert float(again.stdout.partition(" hits, ")[2].partition(" s")[0]) < 5


def test_quiet_build_says_nothing_on_stderr(build_arguments: list[object], tmp_path: Path) -> None:
    assert run("-q", "build", *build_arguments, "--output", tmp_path / "bundle").stderr == ""
    assert run("build", *build_arguments, "--output", tmp_path / "bundle", "-q").stderr == ""


def test_build_on_a_terminal_shows_a_bar(
    build_arguments: list[object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    result = run("build", *build_arguments, "--output", tmp_path / "bundle")
    assert "[1/" not in result.stderr
    assert "0 built" in result.stdout


def test_build_with_nothing_to_do_imports_no_compiler(build_arguments: list[object], tmp_path: Path) -> None:
    run("build", *build_arguments, "--output", tmp_path / "bundle")
    assert not modules_after("build", *build_arguments, "--output", tmp_path / "bundle") & set(HEAVY)


def test_export_writes_graphs_without_weights(build_arguments: list[object], tiny_copy: Path, tmp_path: Path) -> None:
    for file in tiny_copy.rglob("*.safetensors"):
        file.unlink()
    arguments = [build_arguments[0], "--model", tiny_copy, *build_arguments[3:]]
    document = run_json("export", *arguments, "--output", tmp_path / "graphs")
    names = sorted(Path(graph).name for graph in document["graphs"])
    assert names == sorted(path.name for path in (tmp_path / "graphs").glob("*.onnx"))
    assert "denoiser-1x64x64.onnx" in names
    assert (tmp_path / "graphs" / "denoiser-1x64x64.weights.json").exists()


def kill_after_first_artifact(command: list[str], store: Path, before: set[str]) -> None:
    """Starts a build and kills it without warning as soon as it has published something new."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 120
        while {a.key for a in Store(store).artifacts()} == before:
            assert child.poll() is None, child.stderr and child.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert child.poll() is None, "the build was over before it could be killed"
        os.kill(child.pid, signal.SIGKILL)
    finally:
        child.kill()
        child.communicate()


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_build_goes_on_where_it_was_killed(build_arguments: list[object], store: Path, tmp_path: Path) -> None:
    # Two graphs and an engine are made anew, so that the kill lies between the first and the others.
    # Without .tmp: another worker may be in the middle of a build there.
    own = Path(shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns(".tmp")))
    kept = {(s["stage"], s["key"]) for s in run_json("plan", *build_arguments)["steps"]}
    for artifact in list(Store(own).artifacts()):
        gone = artifact.stage == "graph" and artifact.subject.endswith((" any", "vae_decoder 1x64x64"))
        if gone or (artifact.stage, artifact.key) not in kept:
            shutil.rmtree(artifact.path)
    before = {artifact.key for artifact in Store(own).artifacts()}
    arguments = ["build", *build_arguments[:3], "--store", own, "--output", tmp_path / "bundle"]
    kill_after_first_artifact(process(*arguments), own, before)
    finished = {artifact.key for artifact in Store(own).artifacts()} - before
    assert len(finished) == 1
    assert not (tmp_path / "bundle").exists()
    document = run_json(*arguments)
    results = {step["key"]: step["result"] for step in document["steps"]}
    assert [results[key] for key in finished] == ["hit"]
    assert document["built"] == 1
    run("inspect", tmp_path / "bundle", "--verify")
    assert list((own / ".tmp").iterdir()) == []


# --- generate ---------------------------------------------------------------------------------------------------------


def test_generate_writes_a_picture_with_its_settings(tiny_bundle: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    given = ["--negative", "ünscharf", "--seed", 7, "--steps", 4, "--scheduler", "euler-a", "--guidance", 3.5]
    result = run("generate", tiny_bundle, PROMPT, *given, "--size", "64x96", "--output", path)
    assert f"{path}  seed 7" in result.stdout
    assert "generated in" in result.stdout
    with Image.open(path) as image:
        assert image.size == (96, 64)
        texts = dict(image.text)  # type: ignore[attr-defined]
    assert texts == {
        "prompt": PROMPT,
        "negative_prompt": "ünscharf",
        "seed": "7",
        "steps": "4",
        "scheduler": "euler-a",
        "guidance": "3.5",
    }


def test_generate_with_the_same_seed_gives_the_same_bytes(tiny_bundle: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run("generate", tiny_bundle, PROMPT, "--seed", seed, "-o", tmp_path / f"{name}.png")
    a, b, c = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert a == b != c


def test_generate_takes_a_list_in_place_of_steps(tiny_bundle: Path, tmp_path: Path) -> None:
    (image,) = run_json("generate", tiny_bundle, PROMPT, "--sigmas", "9.5,2,0", "-o", tmp_path / "a.png")["images"]
    assert (image["scheduler"], image["steps"]) == ("euler:sigmas=9.5 2 0", 2)
    assert numbers("999,500.5") == [999, 500.5]
    with pytest.raises(click.BadParameter, match="with commas between them"):
        numbers("999 500")


def test_generate_numbers_several_pictures(tiny_bundle: Path, tmp_path: Path) -> None:
    prompts = [PROMPT, "a blue square", "a circle"]
    document = run_json("generate", tiny_bundle, *prompts, "--seed", 5, "-o", tmp_path / "x.png", "--no-verify")
    assert [i["path"] for i in document["images"]] == [str(tmp_path / f"x-{n}.png") for n in (1, 2, 3)]
    assert [i["seed"] for i in document["images"]] == [5, 6, 7]
    assert [i["prompt"] for i in document["images"]] == prompts
    assert document["images"][0]["scheduler"] == "euler"
    assert document["images"][0]["guidance"] == 5.0
    assert document["timings"]["total_ms"] > 0
    assert not (tmp_path / "x.png").exists()


def test_generate_names_files_after_the_seed_and_overwrites_none(
    tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        run("generate", tiny_bundle, PROMPT, "--seed", 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["diffbuild-3-2.png", "diffbuild-3.png"]
    document = run_json("generate", tiny_bundle, PROMPT)
    (image,) = document["images"]
    assert image["path"] == f"diffbuild-{image['seed']}.png"


def test_generate_crops(tiny_bundle: Path, tmp_path: Path) -> None:
    run("generate", tiny_bundle, PROMPT, "--size", "48x80", "--crop", "--seed", 0, "-o", tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.size == (80, 48)


def test_generate_imports_no_compiler(tiny_bundle: Path, tmp_path: Path) -> None:
    loaded = modules_after("generate", tiny_bundle, PROMPT, "--seed", 0, "-o", tmp_path / "a.png")
    assert "onnxruntime" in loaded
    assert not loaded & {*HEAVY, "rich", "huggingface_hub"}


def test_generate_on_a_terminal_shows_a_bar(tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "_on_terminal", lambda: True)
    assert "generated" in run("generate", tiny_bundle, PROMPT, "-o", tmp_path / "a.png").stdout


# --- check ------------------------------------------------------------------------------------------------------------


class FakeReport:
    def __init__(self, passed: bool) -> None:
        self.passed = passed

    def to_json(self) -> dict[str, Any]:
        return {"passed": self.passed, "psnr_db": float("inf"), "schema": 7}

    def lines(self) -> list[str]:
        return ["denoiser 70.1 dB", "passed" if self.passed else "failed"]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps({"passed": self.passed}))


@pytest.fixture(params=[True, False], ids=["passes", "fails"])
def verdict(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    passed: bool = request.param

    def compare(*_: object, progress: Any, **__: object) -> FakeReport:
        print("a library's chatter")
        progress("denoiser")
        return FakeReport(passed)

    monkeypatch.setattr("toolchain.check.compare.compare", compare)
    return passed


def test_check_prints_the_report_and_exits_3_when_a_gate_fails(
    verdict: bool, tiny_bundle: Path, tiny_model: Path, tmp_path: Path
) -> None:
    target = tmp_path / "report.json"
    result = run("check", tiny_bundle, "--model", tiny_model, "--report", target, code=0 if verdict else 3)
    assert result.stdout == f"denoiser 70.1 dB\n{'passed' if verdict else 'failed'}\n"
    assert "denoiser ..." in result.stderr
    assert json.loads(target.read_text()) == {"passed": verdict}


def test_check_as_json(verdict: bool, tiny_bundle: Path, tiny_model: Path) -> None:
    document = run_json("check", tiny_bundle, "--model", tiny_model, code=0 if verdict else 3)
    assert document == {"schema": 1, "passed": verdict, "psnr_db": "inf"}


# --- inspect, doctor, cache -------------------------------------------------------------------------------------------


def test_inspect(tiny_bundle: Path) -> None:
    text = run("inspect", tiny_bundle).stdout
    for part in (
        "StableDiffusionPipeline",
        "1x64x64, 2x64x96",
        "euler-a/4",
        "denoiser",
        "onnxruntime",
        "--verify does",
    ):
        assert part in text
    assert "every sha256 matches" in run("inspect", tiny_bundle, "--verify").stdout
    document = run_json("inspect", tiny_bundle, "--verify")
    assert document["verified"] is True
    assert document["runs_here"] is True
    assert document["components"]["denoiser"]["bytes"]["weights"] > 1_000_000
    assert document["recipe"]["name"] == "tiny"


def test_inspect_of_a_foreign_bundle_says_that_it_cannot_run_here(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda data: data["device"].update(cpu="riscv64"))
    assert "no: built on riscv64" in run("inspect", bundle_copy).stdout
    assert run_json("inspect", bundle_copy)["runs_here"] is False


def test_a_build_for_elsewhere_is_not_told_to_draw_here(tiny_bundle: Path) -> None:
    bundle = toolchain.read_bundle(tiny_bundle)
    shown = progress.Steps(None)
    assert list(build_lines(bundle, shown))[-1].startswith("next: diffbuild generate")
    foreign = dataclasses.replace(bundle, backend="tensorrt_rtx")
    *_, reason, following = build_lines(foreign, shown)
    assert reason.startswith("it does not run here: ")
    assert following.startswith(f"next: diffbuild inspect {tiny_bundle}")


def test_doctor(tmp_path: Path) -> None:
    text = run("doctor", "--store", tmp_path / "s").stdout
    assert re.search(r"^backend onnxruntime +works: kind cpu, cpu \S+, onnxruntime [\d.]+$", text, re.MULTILINE)
    for part in ("numpy ", str(tmp_path / "s"), "not there yet", "free"):
        assert part in text
    document = run_json("doctor")
    assert document["works"] is True
    recommended = document["recommended"]
    assert f"recommended {recommended['backend']} in {recommended['dtype']}: this CPU" in " ".join(text.split())
    assert document["store"]["free_bytes"] > 0
    assert document["libraries"]["generate"]["numpy"]


def test_doctor_fails_when_no_backend_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from toolchain.engines.runners import RUNNERS

    for backend in RUNNERS.values():
        monkeypatch.setattr(type(backend), "available", lambda self: "the library is missing")
    assert "cannot run: the library is missing" in run("doctor", code=1).stdout
    assert run_json("doctor", code=1)["works"] is False


@pytest.fixture
def own_store(store: Path, tiny_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the session's store, with an artifact that no bundle needs."""
    copy = Path(shutil.copytree(store, tmp_path / "store", ignore=shutil.ignore_patterns(".tmp")))
    (copy / ".bundles.json").write_text((store / ".bundles.json").read_text())
    Store(copy).get_or_build("sampler", "unused", {"a": 1}, lambda out: (out / "x").write_text("y") and None)
    return copy


def test_cache_ls(own_store: Path) -> None:
    document = run_json("cache", "ls", "--store", own_store)
    assert "unused" in [a["subject"] for a in document["artifacts"]]
    assert document["bytes"] == sum(a["bytes"] for a in document["artifacts"])
    assert f"{len(document['artifacts'])} artifacts" in run("cache", "ls", "--store", own_store).stdout


def test_cache_ls_of_no_store(tmp_path: Path) -> None:
    assert "no such folder" in run("cache", "ls", "--store", tmp_path / "none").stdout
    assert run_json("cache", "ls", "--store", tmp_path / "none")["artifacts"] == []


def test_cache_verify_finds_and_moves_damage(own_store: Path) -> None:
    assert "artifacts are intact" in run("cache", "verify", "--store", own_store).stdout
    victim = next(a for a in Store(own_store).artifacts() if a.subject == "unused")
    (victim.path / "x").write_text("z")
    assert "another content" in run("cache", "verify", "--store", own_store, code=3).stdout
    document = run_json("cache", "verify", "--store", own_store, "--quarantine", code=3)
    assert Path(document["problems"][0]["moved_to"]).is_dir()
    assert not victim.path.exists()
    assert run_json("cache", "verify", "--store", own_store)["problems"] == []


def test_cache_gc_keeps_what_a_bundle_needs(own_store: Path, tiny_bundle: Path) -> None:
    needed = set(toolchain.read_bundle(tiny_bundle).artifacts.values())
    before = {a.key for a in Store(own_store).artifacts()}
    assert needed <= before
    assert run_json("cache", "gc", "--store", own_store)["removed"] == {}  # all of it is young
    dry = run_json("cache", "gc", "--store", own_store, "--min-age", "0", "--dry-run")
    assert dry["dry_run"]
    assert {a.key for a in Store(own_store).artifacts()} == before
    document = run_json("cache", "gc", "--store", own_store, "--min-age", "0")
    assert document["removed"] == dry["removed"]
    after = {a.key for a in Store(own_store).artifacts()}
    assert needed <= after < before
    assert "unused" not in {a.subject for a in Store(own_store).artifacts()}
    assert "removed 0 artifacts" in run("cache", "gc", "--store", own_store, "--min-age", "0").stdout


# --- errors become exit codes -----------------------------------------------------------------------------------------


def fail_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def plan_build(*_: object, **__: object) -> None:
        raise error

    for module in (toolchain.api, toolchain.api.builds):
        monkeypatch.setattr(module, "plan_build", plan_build)


def test_an_error_is_a_message_and_its_exit_code(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, EngineError("no engine", where="here", expected=1, got=2, hint="build"))
    result = run("plan", "r.toml", "--model", "m", code=1)
    assert result.stderr == "error: no engine\n  where: here\n  expected: 1\n  got: 2\n  hint: build\n"
    assert result.stdout == ""


def test_an_error_as_json(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, EngineError("no engine", where=Path("here"), got=2))
    error = run_json("plan", "r.toml", "--model", "m", code=1)["error"]
    assert error == {"what": "no engine", "where": "here", "expected": None, "got": "2", "hint": None}


def test_a_usage_error_names_the_help(monkeypatch: pytest.MonkeyPatch) -> None:
    result = run("plan", "r.toml", "--modell", "m", code=2)
    assert "error: No such option" in result.stderr
    assert "hint: diffbuild plan --help" in result.stderr
    assert run_json("plan", "r.toml", code=2)["error"]["hint"] == "diffbuild plan --help"


def test_an_unexpected_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ZeroDivisionError("by\nzero"))
    result = run("plan", "r.toml", "--model", "m", code=1)
    assert result.stderr.startswith("error: ZeroDivisionError: by zero (this is a bug; -v or DIFFBUILD_LOG=debug")
    assert result.stderr.count("\n") == 1


@pytest.mark.parametrize("how", ["flag", "variable"])
def test_the_traceback_is_shown_when_debugging(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    fail_with(monkeypatch, ZeroDivisionError("by zero"))
    if how == "variable":
        monkeypatch.setenv("DIFFBUILD_LOG", "debug")
    arguments = ["plan", "r.toml", "--model", "m", *(["-v"] if how == "flag" else [])]
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stdout == ""


def test_a_wrong_log_level_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFBUILD_LOG", "loud")
    assert "DIFFBUILD_LOG is not a log level" in run("doctor", code=2).stderr


def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, ModuleNotFoundError("No module named 'torch'", name="torch"))
    assert "hint: pip install 'diffbuild[build]'" in run("plan", "r.toml", "--model", "m", code=1).stderr


def test_what_the_system_refuses_is_no_bug(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, PermissionError(13, "Permission denied", "/x"))
    assert "error: the system refused: Permission denied\n  where: /x\n  got: EACCES" in (
        run("plan", "r.toml", "--model", "m", code=1).stderr
    )


def test_an_interrupt_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    fail_with(monkeypatch, KeyboardInterrupt())
    assert run("plan", "r.toml", "--model", "m", code=130).stderr == "interrupted\n"
    result = run("build", "r.toml", "--model", "m", "--output", "b", code=130)
    assert result.stderr == "interrupted; the same command goes on from here\n"


@pytest.mark.skipif(sys.platform == "win32", reason="no pipes of this kind")
def test_a_closed_pipe_is_quiet(tiny_bundle: Path) -> None:
    child = subprocess.Popen(process("inspect", tiny_bundle, "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.close()
    _, stderr = child.communicate()
    assert stderr == b""


if __name__ == "__main__":
    print("\n".join(describe(cli, "diffbuild")))
