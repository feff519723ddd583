"""How far a long step of a build is, on a terminal's bar and as plain lines."""

from __future__ import annotations

from typing import Any

import pytest

from toolchain import progress
from toolchain.steps import Step


class Bar:
    """What `Steps` uses of rich's bar."""

    def __init__(self) -> None:
        self.shown: list[str] = []

    def add_task(self, description: str, total: int) -> int:
        return 0

    def update(self, task: int, **what: Any) -> None:
        self.shown.append(what["description"])


@pytest.fixture
def step() -> Step:
    return Step("engine", "tiny denoiser 1x64x64", "key", {}, False, (), lambda *_: None)


def test_a_bar_shows_the_phase(step: Step) -> None:
    bar = Bar()
    steps = progress.Steps(3, "tiny", bar)
    steps(step, "start")
    steps.within(step, "Tactic selection", 0.256)
    assert bar.shown == ["engine denoiser 1x64x64", "engine denoiser 1x64x64: Tactic selection 26%"]


def test_a_log_gets_a_line_now_and_then(
    step: Step, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = iter([0.0, 0.0, 59.0, 61.0, 61.0, 62.0, 122.0, 122.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(now))
    steps = progress.Steps(3, "tiny", None)
    steps(step, "start")
    for share in (0.1, 0.2, 0.3, 0.4):
        steps.within(step, "Tactic selection", share)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"engine denoiser 1x64x64: Tactic selection {share}" for share in ("20%", "40%")]
