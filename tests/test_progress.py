"""How far a long step of a build is, on a terminal's bar and as plain lines."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from toolchain.builder.plan import Plan
from toolchain.builder.steps import Step, StepId
from toolchain.cli import progress
from toolchain.runtime.pipeline import Progress as Evaluation


class Bar:
    """What `Steps` uses of rich's bar."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def add_task(self, description: str, total: int) -> int:
        self.total = total
        return 0

    def update(self, task: int, **what: Any) -> None:
        self.shown.append(what["description"])


@pytest.fixture
def step() -> Step:
    return Step(StepId("engine", "denoiser", "1x64x64"), "tiny", "key", {}, False, (), lambda *_: None)


def steps_of(bar: Bar | None) -> progress.Steps:
    """Of a plan with three steps."""
    steps = progress.Steps(bar)
    steps.begin(cast(Plan, SimpleNamespace(steps=(None, None, None))))
    return steps


def test_a_bar_shows_the_phase(step: Step) -> None:
    bar = Bar()
    steps = steps_of(bar)
    assert bar.total == 3
    steps(step, "start")
    steps.within(step, "Tactic selection", 0.256)
    assert bar.shown == ["engine denoiser 1x64x64", "engine denoiser 1x64x64: Tactic selection 26%"]


def test_a_log_gets_a_line_now_and_then(
    step: Step, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 0.0, 0.0, 0.0, 61.0, 62.0, 122.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    steps = steps_of(None)
    steps(step, "start")
    for share in (0.1, 0.2, 0.3, 0.4):
        steps.within(step, "Tactic selection", share)
    told = ("20%, about 4 min left", "40%, about 3 min left")
    assert capsys.readouterr().err.splitlines() == [f"engine denoiser 1x64x64: Tactic selection {t}" for t in told]


@pytest.mark.parametrize(
    ("elapsed_s", "share", "told"),
    [
        (1.9, 0.5, ""),  # too early
        (10.0, 0.0, ""),
        (10.0, 1.0, ""),
        (10.0, 0.99, ""),  # as good as done
        (10.0, 0.5, ", about 10 s left"),
        (80.0, 0.5, ", about 80 s left"),
        (30.0, 0.1, ", about 4 min left"),
        (3600.0, 0.25, ", about 3 h left"),
    ],
)
def test_the_time_that_is_left(elapsed_s: float, share: float, told: str) -> None:
    assert progress.left(elapsed_s, share) == told


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """What `progress` takes for the time, as "now"."""
    found = {"now": 0.0}
    monkeypatch.setattr(progress.time, "perf_counter", lambda: found["now"])
    return found


def test_counted_work_tells_what_is_left(clock: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    """Each kind of work by its own clock; the first of a kind knows nothing yet."""
    with progress.working("measuring") as say:
        for kind in ("round", "picture"):
            for number in (1, 2, 3):
                say(f"{kind} {number} of 5, {'abc'[number - 1]}")
                clock["now"] += 10
        clock["now"] += 3600
        for number in (1, 2):
            say(f"round {number} of 5")
            clock["now"] += 20
    assert capsys.readouterr().err.splitlines() == [
        "measuring ...",
        *("round 1 of 5, a ...", "round 2 of 5, b, about 40 s left ...", "round 3 of 5, c, about 30 s left ..."),
        *("picture 1 of 5, a ...", "picture 2 of 5, b, about 40 s left ...", "picture 3 of 5, c, about 30 s left ..."),
        *("round 1 of 5 ...", "round 2 of 5, about 80 s left ..."),  # anew: what went before is not its own
    ]


def test_denoising_tells_what_is_left(clock: dict[str, float], capsys: pytest.CaptureFixture[str]) -> None:
    """By the steps after the first, before which the text encoders ran."""
    clock["now"] = 100.0
    with progress.evaluations() as shown:
        for index in range(4):
            clock["now"] += 100 if index == 0 else 6
            shown(Evaluation(index, 4, 0.0, lambda: np.zeros(1, np.float32)))
    assert capsys.readouterr().err.splitlines() == [
        "[1/4] denoising",
        "[2/4] denoising, about 12 s left",
        "[3/4] denoising, about 6 s left",
        "[4/4] denoising",
    ]


def test_verbose_names_every_step(step: Step, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "toolchain"):
        steps_of(None)(step, "start")
    assert [record.getMessage() for record in caplog.records] == ["engine denoiser 1x64x64"]
