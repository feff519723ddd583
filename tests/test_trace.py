"""`diffbuild trace`: what lies on the timeline, that it nests and adds up, and that nothing of it stays behind."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from toolchain.bundle.bundle import read_bundle
from toolchain.cli.main import cli
from toolchain.engines.buffers import HostMemory
from toolchain.engines.runners import RUNNERS
from toolchain.errors import RequestError, UsageError
from toolchain.trace.operators import most_expensive, read_profile, share_out
from toolchain.trace.record import trace
from toolchain.trace.timeline import Trace

# PNDM evaluates the network once more than it has steps.
REQUEST = {"prompt": "a red circle", "seed": 3, "scheduler": "model", "steps": 4}
EVALUATIONS = 5
Event = dict[str, Any]


@pytest.fixture(scope="module", params=["tiny_bundle", "openvino_bundle"])
def traced(request: pytest.FixtureRequest) -> Trace:
    return trace(read_bundle(request.getfixturevalue(request.param)), REQUEST, operators=True)


@pytest.fixture(scope="module")
def events(traced: Trace, tmp_path_factory: pytest.TempPathFactory) -> list[Event]:
    """As they come back from the file."""
    path = tmp_path_factory.mktemp("trace") / "trace.json"
    traced.save(path)
    found: list[Event] = json.loads(path.read_text())["traceEvents"]
    return found


def of(events: list[Event], kind: str) -> list[Event]:
    return [event for event in events if event.get("cat") == kind]


def end(event: Event) -> float:
    return float(event["ts"] + event["dur"])


def inside(event: Event, parent: Event) -> bool:
    # The file holds nanoseconds as microseconds with three digits: a float's error is far below one.
    return bool(parent["ts"] - 1e-4 <= event["ts"] and end(event) <= end(parent) + 1e-4)


def test_events_of_a_track_nest(events: list[Event]) -> None:
    """Perfetto draws a later event inside an earlier one only if it ends before it; anything else it drops."""
    spans = [e for e in events if e["ph"] == "X"]
    assert all(e["dur"] >= 0 for e in spans)
    for track in {e["tid"] for e in spans}:
        open_: list[Event] = []
        for event in sorted((e for e in spans if e["tid"] == track), key=lambda e: (e["ts"], -e["dur"])):
            while open_ and end(open_[-1]) <= event["ts"] + 1e-4:
                open_.pop()
            assert not open_ or inside(event, open_[-1]), (event, open_[-1])
            open_.append(event)


def test_what_lies_inside_what(events: list[Event]) -> None:
    (whole,) = of(events, "generation")
    stages = {e["name"]: e for e in of(events, "stage") if e["name"] != "tokenize"}
    assert list(stages) == ["text", "upload", "denoise", "decode"]
    assert all(inside(stage, whole) for stage in stages.values())
    tokenized = [e for e in of(events, "stage") if e["name"] == "tokenize"]
    assert len(tokenized) == 2  # prompt and empty prompt
    assert all(inside(e, stages["text"]) for e in tokenized)
    steps = of(events, "step")
    assert len(steps) == EVALUATIONS
    assert all(inside(step, stages["denoise"]) for step in steps)
    calls = of(events, "engine")
    assert [e["name"] for e in calls] == [*["text_encoder"] * 2, *["denoiser 1x64x64"] * 5, "vae_decoder 1x64x64"]
    assert all(inside(call, step) for call, step in zip(calls[2:-1], steps, strict=True))
    assert inside(calls[-1], stages["decode"])
    assert sum(call["dur"] for call in calls) <= whole["dur"]


def test_operators_lie_within_their_engine_call(events: list[Event]) -> None:
    calls, operators = of(events, "engine"), of(events, "operator")
    assert {e["tid"] for e in operators}.isdisjoint({e["tid"] for e in calls})
    homes = [[i for i, call in enumerate(calls) if inside(operator, call)] for operator in operators]
    assert all(len(home) == 1 for home in homes)
    assert all(calls[home[0]]["name"] == o["args"]["engine"] for home, o in zip(homes, operators, strict=True))
    counts = [homes.count([i]) for i in range(len(calls))]
    assert len(set(counts[2:-1])) == 1  # the same graph each time
    assert min(counts) > 10
    convolutions = [o for o in operators if o["name"].startswith("Conv") and o["name"] != "Convert"]
    assert re.search(r"-> (float|f32)\[2x", convolutions[0]["args"]["shapes"])  # with guidance


def test_a_call_is_given_its_own_launch(traced: Trace) -> None:
    """The profiler saw the warm-up too. What it saw of a launch is shorter than the call around it, by microseconds."""
    for engine, launches in traced.launches.items():
        calls = [span for span in traced.of("engine") if span.name == engine]
        assert all(launch.duration_us <= call.ms * 1e3 + 1 for launch, call in zip(launches, calls, strict=True)), (
            engine
        )


def test_tracks_have_names(events: list[Event]) -> None:
    named = {e["tid"]: e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert set(named) == {e["tid"] for e in events if e["ph"] == "X"}
    (process,) = (e["args"]["name"] for e in events if e["name"] == "process_name")
    assert process in ("diffbuild tiny (onnxruntime)", "diffbuild tiny-openvino (openvino)")


def test_the_summary_adds_up(traced: Trace) -> None:
    found = traced.summary()
    assert (found["evaluations"], found["seed"], found["scheduler"]) == (EVALUATIONS, 3, "model")
    stages = sum(found["stages"][name] for name in ("text", "upload", "denoise", "decode"))
    assert 0.5 * found["total_ms"] < stages <= found["total_ms"]
    assert found["engines"]["denoiser 1x64x64"]["calls"] == EVALUATIONS
    costs = found["operators"]["denoiser 1x64x64"]
    assert len(costs) == 10
    assert [c["total_ms"] for c in costs] == sorted((c["total_ms"] for c in costs), reverse=True)
    assert {c["calls"] for c in costs} == {EVALUATIONS}
    assert sum(c["total_ms"] for c in costs) <= found["engines"]["denoiser 1x64x64"]["total_ms"]
    text = "\n".join(traced.lines())
    assert "5 evaluations in " in text
    assert "the most expensive operators of vae_decoder 1x64x64:" in text


def test_a_request_that_is_refused(tiny_bundle: Path) -> None:
    with pytest.raises(RequestError):
        trace(read_bundle(tiny_bundle), {**REQUEST, "size": (8, 8)})


def test_operators_of_another_backend_are_refused(tiny_bundle: Path) -> None:
    with pytest.raises(UsageError, match=r"(?s)on the CPU.*a bundle of onnxruntime or openvino.*nsys profile"):
        trace(replace(read_bundle(tiny_bundle), backend="tensorrt"), REQUEST, operators=True)


def test_operators_of_another_device_than_the_cpu_are_refused(openvino_bundle: Path) -> None:
    bundle = read_bundle(openvino_bundle)
    recipe = replace(bundle.recipe, openvino=replace(bundle.recipe.openvino, device="GPU"))
    with pytest.raises(UsageError, match=r'got: openvino with device = "GPU"'):
        trace(replace(bundle, recipe=recipe), REQUEST, operators=True)


def test_what_openvino_counts_is_the_mean_of_the_recorded_launches(openvino_bundle: Path) -> None:
    """It keeps the mean over all launches, the warm-up's too: that is taken out again."""
    traced = trace(read_bundle(openvino_bundle), REQUEST, operators=True)
    launches = traced.launches["denoiser 1x64x64"]
    assert len(launches) == EVALUATIONS
    shares = [[(o.end_us - o.start_us) / launch.duration_us for o in launch.operators] for launch in launches]
    assert all(share == pytest.approx(shares[0]) for share in shares)
    assert [o.name for o in launches[0].operators] == [o.name for o in launches[-1].operators]
    assert len({o.name for o in launches[0].operators}) == len(launches[0].operators)


def test_operators_are_shared_out_over_launches() -> None:
    first, second = share_out([("a", "Conv", 20.0, ""), ("b", "MatMul", 10.0, "")], [30.0, 60.0])
    assert [(o.name, o.start_us, o.end_us) for o in second.operators] == [
        ("a", 0.0, pytest.approx(80 / 3)),
        ("b", pytest.approx(80 / 3), 40.0),
    ]
    assert sum(o.end_us - o.start_us for launch in (first, second) for o in launch.operators) == pytest.approx(60)
    (rounded,) = share_out([("a", "Conv", 20.0, "")], [10.0])  # counted in whole microseconds
    assert rounded.operators[0].end_us == 10.0


class Elsewhere:
    """A memory that is not the host's, as far as anybody can see."""

    def __init__(self) -> None:
        self._host = HostMemory()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._host, name)


def test_on_a_gpu_launches_have_a_track_and_ranges(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ranges = []

    @contextmanager
    def annotate(name: str) -> Iterator[None]:
        ranges.append(name)
        yield

    monkeypatch.setattr(RUNNERS["onnxruntime"], "memory", lambda *_: Elsewhere(), raising=False)
    monkeypatch.setitem(sys.modules, "nvtx", SimpleNamespace(annotate=annotate))
    found = trace(read_bundle(tiny_bundle), {**REQUEST, "steps": 4})
    launched = [span for span in found.spans if span.kind == "launch"]
    assert [span.name for span in launched].count("launch denoiser 1x64x64") == EVALUATIONS
    assert {span.track for span in launched} == {"host"}
    assert ranges.count("denoiser 1x64x64") == EVALUATIONS + 1  # and the warm-up
    assert found.nvtx == "NVTX ranges around every launch"
    monkeypatch.setitem(sys.modules, "nvtx", None)
    assert trace(read_bundle(tiny_bundle), REQUEST).nvtx == "no NVTX ranges: pip install nvtx"


def test_a_profile_is_read_launch_by_launch(tmp_path: Path) -> None:
    def event(name: str, ts: int, dur: int, kind: str | None = None) -> Event:
        about = {"op_name": kind, "input_type_shape": [{"float": [1, 2]}], "output_type_shape": [{"float": [2]}]}
        return {"cat": "Node" if kind else "Session", "name": name, "ts": ts, "dur": dur, "args": about}

    listed = [
        event("session_initialization", 0, 90),
        event("b_kernel_time", 130, 30, "Conv"),
        event("a_kernel_time", 110, 10, "Conv"),
        event("model_run", 100, 59),  # its last operator seems to end after it: whole microseconds
        event("a_kernel_time", 210, 20, "Conv"),
        event("model_run", 200, 40),
    ]
    (tmp_path / "profile.json").write_text(json.dumps(listed))
    first, second = read_profile(tmp_path / "profile.json")
    assert [(o.name, o.start_us, o.end_us) for o in first.operators] == [("a", 10.0, 20.0), ("b", 30.0, 59.0)]
    assert [(o.name, o.shapes) for o in second.operators] == [("a", "float[1x2] -> float[2]")]
    dearest, other = most_expensive([first, second])
    assert (dearest.name, dearest.calls, dearest.total_ms) == ("a", 2, 0.03)
    assert other.share == pytest.approx(29 / 99)


def test_the_command(tiny_bundle: Path, tmp_path: Path) -> None:
    output = tmp_path / "trace.json"
    arguments = ["trace", str(tiny_bundle), "--output", str(output), "--steps", "4", "--size", "64x64", "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert (found["trace"], found["steps"], found["size"]) == (str(output), 4, "64x64")
    assert found["operators"] == {}
    assert of(json.loads(output.read_text())["traceEvents"], "operator") == []
    assert CliRunner().invoke(cli, ["trace", str(tiny_bundle), "-o", str(tmp_path / "no" / "a.json")]).exit_code == 2
