"""The gate of a build: a quantised bundle is checked first, and one that misses a limit does not get to its place."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import toolchain
from tests.pretend import pretended
from tests.rtx import real_trt
from toolchain import api
from toolchain.bundle.bundle import MANIFEST, read_bundle
from toolchain.check.gate import _line
from toolchain.check.report import Entry, Metrics
from toolchain.cli.main import cli
from toolchain.errors import BundleError, DiffbuildError, EngineError, GateError, UsageError

RECIPE = """
family = "sd"
buckets = ["1x64x64"]
without = ["vae_encoder"]
[components.denoiser.quantize]
weights = "int8"
[sampling]
steps = 2
step_counts = [2]
[check]
prompts = ["a red circle", "a blue square"]
psnr_db = 30.0
ssim = 0.9
[check.components.denoiser]
snr_db = 20.0
cosine = 0.99
max_error = 0.5
"""
PLAIN = RECIPE.replace('[components.denoiser.quantize]\nweights = "int8"\n', "")
STRICT = {
    "component": RECIPE.replace("snr_db = 20.0", "snr_db = 150.0"),
    "picture": RECIPE.replace("psnr_db = 30.0", "psnr_db = 150.0"),
    "both": RECIPE.replace("snr_db = 20.0", "snr_db = 150.0").replace("psnr_db = 30.0", "psnr_db = 150.0"),
}


class Case:
    """A recipe, a model and a store; each build writes to one output."""

    def __init__(self, folder: Path, model: Path, store: Path) -> None:
        self.recipe, self.model, self.store = folder / "small.toml", str(model), store
        self.output, self.rejected = folder / "bundle", folder / "bundle.rejected"
        self.events: list[tuple[str, str]] = []
        self.write(RECIPE)

    def write(self, text: str) -> None:
        self.recipe.write_text(text)

    def build(self, **options: Any) -> toolchain.Bundle:
        self.events = []
        note = lambda step, event: self.events.append((step.stage, event))  # noqa: E731
        return api.build(self.recipe, self.model, self.output, store=self.store, progress=note, **options)

    def cli(self, command: str, *options: str) -> tuple[int, Any, str]:
        arguments = [command, str(self.recipe), "--model", self.model, "--store", str(self.store)]
        arguments += ["--output", str(self.output)] if command == "build" else []
        done = CliRunner().invoke(cli, [*arguments, *options])
        answer = json.loads(done.stdout) if "--json" in options else done.stdout
        return done.exit_code, answer, done.stderr

    def left(self) -> set[str]:
        """What lies in the folder of the output."""
        return {path.name for path in self.output.parent.iterdir()} - {"small.toml", "store"}


@pytest.fixture
def case(tmp_path: Path, tiny_model: Path, store: Path) -> Case:
    return Case(tmp_path, tiny_model, store)


def test_a_bundle_within_its_limits_is_checked_once(case: Case) -> None:
    bundle = case.build()
    assert case.events[-1][0] == "gate"
    gate = bundle.gate
    assert gate is not None
    assert gate["state"] == "passed"
    assert len(gate["worst"]) == 2
    assert gate["limits"] == {"psnr_db": 30.0, "ssim": 0.9}
    assert gate["worst_component"]["passed"]
    assert gate["worst_picture"]["psnr_db"] == gate["pictures"]["psnr_db"]["min"]
    assert gate["seconds"] > 0
    assert [step["evaluation"] for step in gate["steps"]["denoiser 1x64x64"]] == [1, 2, 3]  # of PNDM's two steps
    assert all(0.99 < step["cosine"] < 1 for step in gate["steps"]["denoiser 1x64x64"])
    assert "gate small bundle" in bundle.artifacts
    before = (case.output / MANIFEST).read_bytes()
    assert case.build().gate == gate
    assert {event for _, event in case.events} == {"hit"}
    assert (case.output / MANIFEST).read_bytes() == before
    case.output.rename(case.output.with_name("elsewhere"))
    assert case.build().gate == gate, "a bundle that is written anew needs no other check"
    assert case.events[-1] == ("gate", "hit")


def test_a_changed_limit_is_another_gate(case: Case) -> None:
    case.build()
    case.write(RECIPE.replace("psnr_db = 30.0", "psnr_db = 31.0"))
    code, answer, _ = case.cli("plan", "--json")
    assert code == 0
    (missed,) = (step for step in answer["steps"] if not step["hit"])
    assert missed["stage"] == "gate"
    assert missed["changed"] == ["check.psnr_db: 30.0 -> 31.0", "pictures.psnr_db: 30.0 -> 31.0"]
    bundle = case.build()
    assert bundle.gate is not None
    assert bundle.gate["limits"]["psnr_db"] == 31.0


def test_plan_lists_it_and_a_plain_recipe_has_none(case: Case) -> None:
    assert "gate bundle" in case.cli("plan")[1]
    case.write(PLAIN)
    code, answer, _ = case.cli("plan", "--json")
    assert code == 0
    assert "gate" not in {step["stage"] for step in answer["steps"]}
    assert case.build().gate is None
    assert "gate" not in "".join(case.cli("build")[1])


@pytest.mark.parametrize("missed", STRICT)
def test_a_bundle_beyond_its_limits_is_left_aside(case: Case, missed: str) -> None:
    case.build()
    before = {path: path.read_bytes() for path in case.output.rglob("*") if path.is_file()}
    case.write(STRICT[missed])
    code, answer, stderr = case.cli("build", "--json")
    assert code == 3
    assert {path: path.read_bytes() for path in case.output.rglob("*") if path.is_file()} == before
    assert case.left() == {"bundle", "bundle.rejected"}
    got, hint = answer["error"]["got"], answer["error"]["hint"]
    assert answer["error"]["where"] == str(case.rejected)
    assert answer["gate"]["state"] == "failed"
    assert f"diffbuild check {case.rejected} --model {case.model} --html check.html" in hint
    assert "--no-gate" in hint
    assert got in stderr
    if missed != "picture":
        assert "denoiser 1x64x64, prompt " in got
        assert "(at least 150)" in got
        assert any(f"evaluation {n} of " in got for n in (1, 2, 3))
        assert "('a red circle')" in got or "('a blue square')" in got
    if missed != "component":
        assert "picture 64x64, seed 0, 'a " in got
        assert "psnr_db" in got.partition("picture 64x64")[2]
    assert ("picture 64x64" in got, "denoiser" in got) == (missed != "component", missed != "picture")
    aside = read_bundle(case.rejected)
    aside.verify()
    assert aside.gate == answer["gate"]
    shown = CliRunner().invoke(cli, ["inspect", str(case.rejected)])
    assert "gate: FAILED" in shown.output
    assert len(toolchain.load(case.rejected)("a red circle", seed=0).images) == 1
    report = CliRunner().invoke(cli, ["check", str(case.rejected), "--model", case.model])
    assert report.exit_code == 3


def test_the_next_rejection_replaces_the_last(case: Case) -> None:
    case.write(STRICT["both"])
    for psnr in ("150.0", "140.0"):
        case.write(STRICT["picture"].replace("150.0", psnr))
        with pytest.raises(GateError, match="misses the limits"):
            case.build()
        assert read_bundle(case.rejected).recipe.check.psnr_db == float(psnr)
    assert case.left() == {"bundle.rejected"}
    case.write(RECIPE)
    case.build()
    assert case.left() == {"bundle", "bundle.rejected"}


def test_files_of_somebody_else_where_rejected_bundles_lie_are_kept(case: Case) -> None:
    case.rejected.mkdir()
    (case.rejected / "notes.txt").write_text("years of work")
    with pytest.raises(UsageError, match="the output folder holds other files"):
        case.build()
    assert (case.rejected / "notes.txt").read_text() == "years of work"
    assert case.left() == {"bundle.rejected"}


def test_without_the_gate_the_bundle_says_so(case: Case) -> None:
    case.write(STRICT["both"])
    code, answer, _ = case.cli("build", "--no-gate", "--json")
    assert code == 0
    assert answer["gate"] == {"state": "not checked", "reason": "it was built with --no-gate"}
    assert "gate" not in {step["stage"] for step in answer["steps"]}
    code, text, _ = case.cli("build", "--no-gate")
    assert "gate: not run, because it was built with --no-gate" in text
    assert "0 built" in text
    shown = CliRunner().invoke(cli, ["inspect", str(case.output)])
    assert "gate: not run, because it was built with --no-gate" in shown.output
    assert case.cli("build")[0] == 3, "a bundle without a gate is not taken for one that passed"


def test_engines_that_cannot_run_here_are_not_checked(case: Case, graphs_into: Callable[..., None]) -> None:
    """NVIDIA's own builder, on a machine without a GPU. Its engines are none for the stand-in of other tests."""
    real_trt()
    case.store = case.output.parent / "store"
    case.write(RECIPE.replace('family = "sd"', 'family = "sd"\nbackend = "tensorrt_rtx"'))
    graphs_into(case.store, case.recipe, Path(case.model))
    code, answer, _ = case.cli("plan", "--json")
    assert code == 0
    assert answer["ungated"].startswith("its engines cannot run on this machine: ")
    code, answer, _ = case.cli("build", "--json")
    assert code == 0
    assert answer["gate"]["state"] == "not checked"
    for command in ("plan", "build"):
        assert "gate: not run, because its engines cannot run on this machine: " in case.cli(command)[1]
    assert "0 built" in case.cli("build")[1]


def test_engines_that_cannot_be_built_here_are_not_checked(case: Case) -> None:
    case.write(RECIPE.replace('family = "sd"', 'family = "sd"\nbackend = "tensorrt"'))
    code, answer, _ = case.cli("plan", "--json")
    assert code == 0
    assert answer["ungated"].startswith("no engines can be built on this machine: ")


def test_the_pretended_gpu_runs_it(case: Case, tmp_path: Path) -> None:
    case.write(RECIPE.replace('family = "sd"', 'family = "sd"\nbackend = "tensorrt"'))
    with pretended(DIFFBUILD_CACHE=str(tmp_path / "store")) as trt:
        bundle = case.build()
        assert bundle.gate is not None
        assert bundle.gate["state"] == "passed"
        assert trt.violations == []


def test_an_interruption_leaves_the_old_bundle_and_nothing_else(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    case.write(PLAIN)
    case.build()
    case.write(RECIPE.replace("psnr_db = 30.0", "psnr_db = 26.0"))

    def interrupt(*_: Any) -> Mapping[str, Any]:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("toolchain.check.gate.check_gate", interrupt)
        with pytest.raises(KeyboardInterrupt):
            case.build()
    assert case.left() == {"bundle"}
    assert read_bundle(case.output).gate is None
    assert case.build().gate is not None


def test_what_stops_the_check_is_told_from_what_stops_the_build(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Mapping[str, Any]:
        raise EngineError("the engine cannot be opened", where="somewhere")

    monkeypatch.setattr("toolchain.check.gate.check_gate", fail)
    case.write(RECIPE.replace("psnr_db = 30.0", "psnr_db = 29.0"))
    with pytest.raises(EngineError, match=r"gate: the engine cannot be opened\n(.|\n)*--no-gate"):
        case.build()
    assert case.left() == set()


def test_missing_packages_are_found_before_any_work(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    case.write(RECIPE.replace("psnr_db = 30.0", "psnr_db = 28.0"))
    with pytest.raises(DiffbuildError, match=r"polygraphy not installed\n(.|\n)*--no-gate"):
        case.build()
    assert case.events == []
    case.build(gate=False)


def test_a_machine_too_small_for_the_reference_is_refused_before_any_work(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("toolchain.check.gate.physical_memory", lambda: 10**5)
    case.write(RECIPE.replace("psnr_db = 30.0", "psnr_db = 25.0"))
    with pytest.raises(DiffbuildError, match=r"does not fit into this machine\n(.|\n)*--no-gate"):
        case.build()
    assert case.events == []
    monkeypatch.setattr("toolchain.check.gate.physical_memory", lambda: None)
    assert case.build().gate is not None


def test_the_prompts_of_a_batch_are_named() -> None:
    metrics = Metrics(0.9, 10.0, 0.5)
    entry = Entry("denoiser", "2x64x64", "prompts 2-3, evaluation 1 of 2", "next_state", metrics, metrics, ())
    said = _line(entry, ("a", "b", "c", "d"))
    assert said.startswith("denoiser 2x64x64, prompts 2-3, evaluation 1 of 2 ('b', 'c'), next_state: cosine 0.9")
    table = Entry("sampler", "any", "model/20", "trajectory", metrics, metrics, ())
    assert _line(table, ("a",)).startswith("sampler any, model/20, trajectory: ")


def test_the_result_is_covered_by_the_manifests_digest(case: Case) -> None:
    case.build()
    path = case.output / MANIFEST
    path.write_text(path.read_text().replace('"state": "passed"', '"state": "failed"'))
    with pytest.raises(BundleError, match="was changed"):
        read_bundle(case.output)


def test_time_is_compared_where_the_store_has_the_plain_engine(
    case: Case, tmp_path: Path, graphs_into: Callable[..., None]
) -> None:
    case.store = tmp_path / "store"
    graphs_into(case.store, case.recipe, Path(case.model))
    gate = case.build().gate
    assert gate is not None
    assert gate["step_time"].keys() == {"text"}
    assert "had no engine of the denoiser without quantisation" in gate["step_time"]["text"]
    case.write(PLAIN)
    case.build()
    case.write(RECIPE.replace("psnr_db = 30.0", "psnr_db = 27.0"))
    gate = case.build().gate
    assert gate is not None
    times = gate["step_time"]
    assert times["times_as_long"] == times["quantized_ms"] / times["unquantized_ms"]
    assert times["saved_bytes"] > 0
    assert times["text"] in case.cli("build")[1]
