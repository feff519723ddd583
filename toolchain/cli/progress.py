"""Progress of long work on stderr: a progress bar on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.terminal import echo, painted

if TYPE_CHECKING:
    from toolchain.builder.plan import Plan
    from toolchain.builder.steps import Step
    from toolchain.runtime.progress import Progress as Evaluation

log = logging.getLogger("toolchain")

PLAIN_EVERY_S = 5.0
"""Between two lines of one picture: enough for a log to show that it goes on."""
BUILD_EVERY_S = 60.0
"""Between two lines of one step of a build: an engine may take an hour."""
TOO_EARLY_S = 2.0
"""No remaining time is estimated from less."""
COUNTED = re.compile(r"(\d+) of (\d+)")


def left(elapsed_s: float, share: float) -> str:
    """The remaining time as text, where `share` of the work took `elapsed_s`; empty where that tells too little."""
    if elapsed_s < TOO_EARLY_S or not 0 < share < 1:
        return ""
    seconds = elapsed_s * (1 - share) / share
    if seconds < 1:
        return ""
    for unit, one in (("h", 3600.0), ("min", 60.0)):
        if seconds >= 1.5 * one:
            return f", about {seconds / one:.0f} {unit} left"
    return f", about {seconds:.0f} s left"


@dataclass(frozen=True)
class Finished:
    """A step of a build that is done; `result` is "built" or "hit"."""

    step: Step
    result: str
    seconds: float


class Steps:
    """Shows the steps of a build and remembers them: `begin` gets its plan, a call (step, "start" | "built" | "hit").

    `seconds` is what the whole build took, planning included, once `steps` is left.
    """

    def __init__(self, bar: Any) -> None:
        self.finished: list[Finished] = []
        self.seconds = 0.0
        self._total, self._bar = 0, bar
        self._task: Any = None
        self._started = self._shown_at = time.perf_counter()
        self._phase, self._phase_began = "", 0.0

    def begin(self, plan: Plan) -> None:
        """Tells how many steps there will be."""
        self._total = len(plan.steps)
        self._task = self._bar.add_task("", total=self._total) if self._bar else None
        self._started = self._shown_at = time.perf_counter()

    @property
    def built(self) -> int:
        """How many of the finished steps were not in the store."""
        return sum(f.result == "built" for f in self.finished)

    def within(self, step: Step, phase: str, share: float | None) -> None:
        """Shows the phase of a long step and the share of it that is done, 0 to 1; None where that is unknown."""
        now = time.perf_counter()
        if phase != self._phase:
            self._phase, self._phase_began = phase, now
        line = f"{step.id}: {phase}"
        line += "" if share is None else f" {share:.0%}{left(now - self._phase_began, share)}"
        if self._bar:
            self._bar.update(self._task, description=line)
        elif _shown() and now - self._shown_at >= BUILD_EVERY_S:
            self._shown_at = now
            echo(line, err=True)

    def __call__(self, step: Step, event: str) -> None:
        if event == "start":
            self._started = self._shown_at = time.perf_counter()
            self._phase = ""
            log.debug("%s", step.id)
            if self._bar:
                self._bar.update(self._task, description=str(step.id))
        else:
            self._finish(step, event)

    def _finish(self, step: Step, event: str) -> None:
        # A build with nothing to do reports its hits without a start.
        now = time.perf_counter()
        done = Finished(step, event, now - self._started)
        self._started = now
        self.finished.append(done)
        took = f" {done.seconds:.1f} s" if event == "built" else ""
        line = f"[{len(self.finished)}/{self._total}] {step.id} ... {event}{took}"
        if self._bar:
            self._bar.update(self._task, advance=1)
            if event == "built" or log.isEnabledFor(logging.DEBUG):
                echo(painted(line), err=True)
        elif _shown():
            echo(painted(line), err=True)


class Evaluations:
    """Shows the denoising steps of `generate`: a callback of the pipeline."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task: Any = None
        self._began = self._last = time.perf_counter()

    def __call__(self, progress: Evaluation) -> None:
        done, now = progress.index + 1, time.perf_counter()
        if progress.index == 0:  # what came before it was no evaluation
            self._began = now
            self._task = self._bar.add_task("denoising", total=progress.total) if self._bar else None
        # The first is where the clock starts, and not among those that it has timed.
        eta = left(now - self._began, progress.index / (progress.total - 1)) if progress.total > 1 else ""
        if self._bar:
            self._bar.update(self._task, completed=done, description=f"denoising{eta}")
        elif _shown() and now - self._last >= PLAIN_EVERY_S:
            self._last = now
            echo(f"[{done}/{progress.total}] denoising{eta}", err=True)


@contextmanager
def steps() -> Iterator[Steps]:
    """For the steps of a build. What libraries print on stdout goes to stderr: stdout is the command's answer."""
    began = time.perf_counter()
    with redirect_stdout(sys.stderr), _bar() as bar:
        shown = Steps(bar)
        yield shown
        shown.seconds = time.perf_counter() - began


@contextmanager
def evaluations() -> Iterator[Evaluations]:
    """For the denoising steps of a picture; stdout as in `steps`."""
    with redirect_stdout(sys.stderr), _bar() as bar:
        yield Evaluations(bar)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """For work of unknown length: yields a function to call with what is being done now. stdout as in `steps`.

    A text with "3 of 8" in it is shown with the remaining time, estimated from those of its kind before it: those that
    begin alike, since the number was last a smaller one than before.
    """
    # Text before the numbers -> when its first came, which that was, and the last number.
    began: dict[str, tuple[float, int, int]] = {}

    def with_time(text: str) -> str:
        match = COUNTED.search(text)
        if match is None:
            return text
        now, number, total = time.perf_counter(), int(match[1]), int(match[2])
        kind = text[: match.start()]
        since, first, last = began.get(kind, (now, number, number))
        if number < last:
            since, first = now, number
        began[kind] = since, first, number
        return text + left(now - since, (number - first) / max(total - first + 1, 1))

    with redirect_stdout(sys.stderr), _bar() as bar:
        task = bar.add_task(what, total=None) if bar else None

        def say(text: str) -> None:
            line = with_time(text)
            if bar:
                bar.update(task, description=line)
                log.debug("%s", line)
            elif _shown():
                echo(f"{line} ...", err=True)

        say(what)
        yield say


def _shown() -> bool:
    return log.isEnabledFor(logging.WARNING)


def _on_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def _bar() -> Iterator[Any]:
    """A progress bar of rich; None where there is no terminal, or with --quiet."""
    if not (_shown() and _on_terminal()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(bar_width=max(6, min(24, console.width // 10))),  # what is said beside it matters more
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        yield bar


class _Handler(logging.Handler):
    """Writes log records to the current sys.stderr, which a progress bar replaces while it is shown."""

    def emit(self, record: logging.LogRecord) -> None:
        echo(painted(self.format(record)), err=True)


class _Formatter(logging.Formatter):
    """Debug records carry the seconds since the process began."""

    def format(self, record: logging.LogRecord) -> str:
        when = f"{record.relativeCreated / 1e3:.2f} s: " if record.levelno <= logging.DEBUG else ""
        return f"{record.levelname.lower()}: {when}{super().format(record)}"


def start_logging(level: int) -> None:
    """Sends this package's log to stderr. Calling it again only changes the level."""
    if not any(isinstance(handler, _Handler) for handler in log.handlers):
        handler = _Handler()
        handler.setFormatter(_Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(level)
