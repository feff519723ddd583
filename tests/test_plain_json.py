"""One rule for the numbers that JSON lacks, in every document that a command prints and every report that it writes."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import toolchain
from tests.check.test_check_report import entry, report
from tests.test_bench import ROUNDS
from toolchain.bench.results import BenchReport, ContenderResult, Spread, summarize
from toolchain.check.report import CheckReport, Picture
from toolchain.cli.main import cli
from toolchain.store.plain_json import encode, plain
from toolchain.trace.timeline import Span, Trace

ROOT = Path(toolchain.__file__).parent


def strict(text: str) -> Any:
    """Parsed as programs in other languages do: NaN and Infinity are no JSON."""

    def refuse(token: str) -> float:
        raise AssertionError(token)

    return json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (math.nan, "nan"),
        (1.5, 1.5),
        (True, True),
        (None, None),
        ((1, [math.inf]), [1, ["inf"]]),
        ({"a": {"b": -math.inf}}, {"a": {"b": "-inf"}}),
        (Path("a") / "b", "a/b"),
    ],
)
def test_the_rule(value: Any, written: Any) -> None:
    assert plain(value) == written
    assert strict(encode(value)) == written


def test_the_strings_are_numbers_again() -> None:
    for value in (math.inf, -math.inf):
        assert float(plain(value)) == value
    assert math.isnan(float(plain(math.nan)))


def test_what_json_cannot_hold_is_refused() -> None:
    with pytest.raises(TypeError):
        encode({"a": object()})


def checked() -> CheckReport:
    pictures = [Picture("equal", 0, "64x64", math.inf, 1.0, ()), Picture("broken", 1, "64x64", math.nan, math.nan, ())]
    return report([entry(snr_db=math.inf), entry(snr_db=-math.inf, max_error=math.nan)], pictures)


def benched() -> BenchReport:
    ours = summarize({"process_ms": 50.0}, ROUNDS, {"peak_mb": None})
    theirs = ContenderResult({}, {"denoise_ms": Spread(30, 29, 31)}, Spread(35, 34, 36), None, {"speed": math.nan})
    return BenchReport(
        bundle="bundle",
        recipe="tiny",
        workload={"batch": 1, "size": "64x64", "steps": 4, "scheduler": "euler", "guidance": 5.0},
        repeats=2,
        machine={},
        versions={},
        contenders={"diffbuild": ours, "diffusers": theirs, "compile": theirs},
        ratios={"diffusers": [2.0, math.inf], "compile": [2.0, 2.0]},
        likeness_db={"diffusers": math.inf, "compile": None},
        sweeps={},
    )


def test_check(monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path, tiny_model: Path, tmp_path: Path) -> None:
    monkeypatch.setattr("toolchain.check.compare.compare", lambda *_, **__: checked())
    target = tmp_path / "check.json"
    arguments = ["check", str(tiny_bundle), "--model", str(tiny_model), "--report", str(target), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    printed = strict(done.stdout)
    assert printed == strict(target.read_text())
    assert [p["psnr_db"] for p in printed["pictures"]] == ["inf", "nan"]
    assert [e["metrics"]["snr_db"] for e in printed["entries"]] == ["inf", "-inf"]


def test_bench_tells_equal_pictures_from_pictures_of_two_sizes(
    monkeypatch: pytest.MonkeyPatch, tiny_bundle: Path
) -> None:
    monkeypatch.setattr("toolchain.bench.run.bench", lambda *_, **__: benched())
    done = CliRunner().invoke(cli, ["bench", str(tiny_bundle), "--json"])
    assert done.exit_code == 0, done.output
    printed = strict(done.stdout)
    assert printed["likeness_db"] == {"diffusers": "inf", "compile": None}
    assert printed["ratios"]["diffusers"]["rounds"] == [2.0, "inf"]
    assert printed["contenders"]["diffusers"]["counts"] == {"speed": "nan"}


def test_trace(tmp_path: Path) -> None:
    whole = Span("generation", "generation", (0.0, 1.0))
    step = Span("evaluation 1 of 1", "step", (0.0, 1.0), {"timestep": math.inf})
    recorded = Trace("tiny", {"seed": 0}, (whole, step), {})
    recorded.save(tmp_path / "trace.json")
    events = strict((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [e["args"] for e in events if e.get("cat") == "step"] == [{"timestep": "inf"}]
    assert strict(encode(replace(recorded, about={"guidance": math.nan}).summary()))["guidance"] == "nan"


def test_documents_and_reports_are_written_by_this_rule_alone() -> None:
    places = [ROOT / "bench" / "results.py"]
    places += [p for room in ("api", "cli", "check", "trace") for p in (ROOT / room).rglob("*.py")]
    assert [p.name for p in places if "json.dump" in p.read_text()] == []
