"""ONNX Runtime comes in one of two packages: neither, both, and which command opens a bundle."""

from __future__ import annotations

import json
import logging
import tomllib
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
from click.testing import CliRunner

from tests.test_cli import run, run_json
from toolchain.cli.main import cli
from toolchain.engines import machine
from toolchain.engines.onnxruntime import package as onnxruntime_package
from toolchain.engines.onnxruntime.device import cpu_device
from toolchain.engines.onnxruntime.package import CPU, GPU, clash, command, module_version, warn_of_clash
from toolchain.engines.onnxruntime_cuda import provider as cuda_provider
from toolchain.engines.runners import RUNNERS
from toolchain.engines.tensorrt.library import PAIR
from toolchain.errors import EngineError

ROOT = Path(__file__).parents[2]
CPU_EXTRA, GPU_EXTRA = "pip install 'diffbuild[cpu]'", "pip install 'diffbuild[cuda]'"


def have(monkeypatch: pytest.MonkeyPatch, **packages: str) -> None:
    """Makes these the packages that are installed; ONNX Runtime cannot be imported where there are none."""

    def version(name: str) -> str:
        if name not in (CPU, GPU):
            return metadata.version(name)
        if name.replace("-", "_") not in packages:
            raise PackageNotFoundError(name)
        return packages[name.replace("-", "_")]

    monkeypatch.setattr(onnxruntime_package, "version", version)
    monkeypatch.setattr(machine, "version", version)
    if not packages:
        monkeypatch.setattr(onnxruntime_package, "find_spec", lambda name: None)
        monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    warn_of_clash.cache_clear()


def test_the_project_needs_neither_and_offers_both() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    assert not any("onnxruntime" in line for line in project["dependencies"])
    assert [line.partition(">=")[0] for line in extras["cpu"]] == ["onnxruntime"]
    assert any(line.startswith("onnxruntime-gpu") for line in extras["cuda"])
    runtimes = [
        name for name in extras if any(line.startswith(("onnxruntime>", "onnxruntime-gpu")) for line in extras[name])
    ]
    assert sorted(runtimes) == ["cpu", "cuda"], "an extra that brings one as well would bring both"
    assert "'.[build,cpu,dev]'" in (ROOT / "Makefile").read_text()


@pytest.mark.parametrize(
    ("packages", "wanted", "number", "expected"),
    [
        ({}, CPU, None, CPU_EXTRA),
        ({}, GPU, "1.31.1", "pip install onnxruntime-gpu==1.31.1"),
        ({"onnxruntime": "1.30.0"}, CPU, "1.31.1", "pip install onnxruntime==1.31.1"),
        ({"onnxruntime": "1.30.0"}, GPU, None, f"pip uninstall -y onnxruntime && {GPU_EXTRA}"),
        (
            {"onnxruntime_gpu": "1.30.0"},
            CPU,
            "1.31.1",
            "pip uninstall -y onnxruntime-gpu && pip install onnxruntime==1.31.1",
        ),
        (
            {"onnxruntime": "1.30.0", "onnxruntime_gpu": "1.31.0"},
            CPU,
            None,
            f"pip uninstall -y onnxruntime onnxruntime-gpu && {CPU_EXTRA}",
        ),
    ],
)
def test_the_command_leaves_one_package(
    packages: dict[str, str], wanted: str, number: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, **packages)
    assert command(wanted, number) == expected


def test_neither(tiny_recipe: Path, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A build is refused at once and planned all the same, and a bundle that was built elsewhere tells its version."""
    have(monkeypatch)
    with pytest.raises(EngineError, match="ONNX Runtime is not installed") as error:
        module_version()
    assert error.value.hint == f"{CPU_EXTRA}, or for an NVIDIA GPU {GPU_EXTRA}"
    arguments = [tiny_recipe, "--model", tiny_model, "--store", tmp_path / "store"]
    said = run("build", *arguments, "-o", tmp_path / "bundle", code=1).stderr
    assert "error: ONNX Runtime is not installed\n" in said
    assert CPU_EXTRA in said
    assert run_json("plan", *arguments)["refused"]["what"] == "ONNX Runtime is not installed"
    assert CPU_EXTRA in str(RUNNERS["onnxruntime"].available())
    assert GPU_EXTRA in str(RUNNERS["onnxruntime_cuda"].available())
    told = CliRunner().invoke(cli, ["doctor", "--json"])  # exit code 1 where nothing else runs either
    assert json.loads(told.stdout)["missing"]["onnxruntime"] == ["onnxruntime", "onnxruntime-gpu"]
    assert RUNNERS["onnxruntime"].install({"onnxruntime": "1.31.1"}) == "pip install onnxruntime==1.31.1"


def test_both(
    tiny_recipe: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import onnxruntime as module

    have(monkeypatch, onnxruntime="1.30.0", onnxruntime_gpu="1.31.0")
    said = str(clash())
    assert "onnxruntime 1.30.0 and onnxruntime-gpu 1.31.0 are both installed" in said
    assert f"pip uninstall -y onnxruntime onnxruntime-gpu, then {CPU_EXTRA}, or {GPU_EXTRA}" in said
    assert module_version() == module.__version__, "the files that are there decide"
    assert run_json("doctor")["advisories"][0] == said
    with caplog.at_level(logging.WARNING, "toolchain"):
        for _ in range(2):
            run("recipe", "check", tiny_recipe, "--model", tiny_model)
    assert [record.getMessage() for record in caplog.records] == [said]


def test_one_is_no_clash(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, onnxruntime="1.31.1")
    assert clash() is None
    assert module_version() == "1.31.1"


@pytest.mark.parametrize(("package", "found"), [("onnxruntime", "onnxruntime"), ("onnxruntime_gpu", "onnxruntime-gpu")])
def test_a_bundle_of_another_minor_version_names_what_opens_it(
    package: str, found: str, bundle_copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    have(monkeypatch, **{package: "1.26.3"})
    built = built_version(bundle_copy)
    wanted = f"pip install {found}=={built}"
    said = run("generate", bundle_copy, "a red circle", code=1).stderr
    assert f"built with onnxruntime {built}, this machine has 1.26.3" in said
    assert f"hint: {wanted}\n" in said
    assert f"this machine has 1.26.3; {wanted}" in run("inspect", bundle_copy).stdout


def built_version(bundle: Path) -> str:
    from toolchain.bundle.bundle import read_bundle

    return str(read_bundle(bundle).device["onnxruntime"])


def test_no_version_opens_a_bundle_of_another_processor() -> None:
    backend, here = RUNNERS["onnxruntime"], cpu_device()
    assert backend.install(here) is None
    assert backend.install({**here, "onnxruntime": "0.9.0", "cpu": "riscv64"}) is None
    assert "onnxruntime" in str(backend.install({**here, "onnxruntime": "0.9.0"}))


def test_engines_for_cuda_want_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    have(monkeypatch, onnxruntime="1.31.1")
    there = {"kind": "cuda", "name": "NVIDIA L4", "onnxruntime": "1.30.2"}
    expected = "pip uninstall -y onnxruntime && pip install onnxruntime-gpu==1.30.2"
    monkeypatch.setattr(cuda_provider, "device_facts", lambda: {"name": "NVIDIA L4"})
    assert RUNNERS["onnxruntime_cuda"].install(there) == expected
    monkeypatch.setattr(cuda_provider, "device_facts", lambda: (_ for _ in ()).throw(EngineError("no GPU")))
    assert RUNNERS["onnxruntime_cuda"].install(there) == expected


def test_tensorrt_for_rtx_names_the_pair_that_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.engines.tensorrt.library.find_spec", lambda name: None)
    assert RUNNERS["tensorrt_rtx"].install({"tensorrt_rtx": "1.7.1.116"}) == PAIR
    assert RUNNERS["tensorrt_rtx"].install({"tensorrt_rtx": "1.7.0.1"}) is None
