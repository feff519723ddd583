"""Progress of long work, on stderr: a bar of rich's on a terminal, plain lines elsewhere, nothing with --quiet."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import click

from toolchain.report import subject

if TYPE_CHECKING:
    from toolchain.runtime.progress import Progress as Evaluation
    from toolchain.steps import Step

log = logging.getLogger("toolchain")

PLAIN_EVERY_S = 5.0
"""Between two lines of one picture: a log file wants to see life, not every step."""
BUILD_EVERY_S = 60.0
"""Between two lines of one step of a build: an engine may take an hour."""


@dataclass(frozen=True)
class Finished:
    """A step of a build that is done; `what` is "built" or "hit"."""

    step: Step
    what: str
    seconds: float


class Steps:
    """Shows the steps of a build and remembers them. Call it with (step, "start" | "built" | "hit")."""

    def __init__(self, total: int, recipe: str, bar: Any) -> None:
        self.finished: list[Finished] = []
        self._total, self._recipe, self._bar = total, recipe, bar
        self._task = bar.add_task("", total=total) if bar else None
        self._started = self._told = time.perf_counter()

    def within(self, step: Step, phase: str, share: float | None) -> None:
        """Shows how far a long step is, as a share of 1; None where nobody can tell."""
        line = f"{subject(step, self._recipe)}: {phase}" + ("" if share is None else f" {share:.0%}")
        if self._bar:
            self._bar.update(self._task, description=line)
        elif _shown() and time.perf_counter() - self._told >= BUILD_EVERY_S:
            self._told = time.perf_counter()
            click.echo(line, err=True)

    def __call__(self, step: Step, what: str) -> None:
        name = subject(step, self._recipe)
        if what == "start":
            self._started = self._told = time.perf_counter()
            if self._bar:
                self._bar.update(self._task, description=name)
            return
        # A build with nothing to do reports its hits without a start.
        now = time.perf_counter()
        done = Finished(step, what, now - self._started)
        self._started = now
        self.finished.append(done)
        took = f" {done.seconds:.1f} s" if what == "built" else ""
        line = f"[{len(self.finished)}/{self._total}] {name} ... {what}{took}"
        if self._bar:
            self._bar.update(self._task, advance=1)
            if what == "built":
                self._bar.console.print(line, markup=False, highlight=False)
        elif _shown():
            click.echo(line, err=True)


class Evaluations:
    """Shows the denoising steps of `generate`. Call it with what the pipeline's callback gets."""

    def __init__(self, bar: Any) -> None:
        self._bar = bar
        self._task: Any = None
        self._last = time.perf_counter()

    def __call__(self, progress: Evaluation) -> None:
        done = progress.index + 1
        if self._bar:
            if self._task is None:
                self._task = self._bar.add_task("denoising", total=progress.total)
            self._bar.update(self._task, completed=done)
        elif _shown() and time.perf_counter() - self._last >= PLAIN_EVERY_S:
            self._last = time.perf_counter()
            click.echo(f"[{done}/{progress.total}] denoising", err=True)


@contextmanager
def steps(total: int, recipe: str) -> Iterator[Steps]:
    """For the steps of a build. What libraries print on stdout goes to stderr: stdout is the command's answer."""
    with redirect_stdout(sys.stderr), _bar() as bar:
        yield Steps(total, recipe, bar)


@contextmanager
def evaluations() -> Iterator[Evaluations]:
    """For the denoising steps of a picture; stdout as in `steps`."""
    with redirect_stdout(sys.stderr), _bar() as bar:
        yield Evaluations(bar)


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """For work whose length nobody knows: gives what to call with each thing that it turns to. stdout as in `steps`."""
    with redirect_stdout(sys.stderr), _bar() as bar:
        task = bar.add_task(what, total=None) if bar else None

        def say(text: str) -> None:
            if bar:
                bar.update(task, description=text)
            elif _shown():
                click.echo(f"{text} ...", err=True)

        say(what)
        yield say


def _shown() -> bool:
    return log.isEnabledFor(logging.WARNING)


def _on_terminal() -> bool:
    return sys.stderr.isatty()


@contextmanager
def _bar() -> Iterator[Any]:
    """A bar of rich's, or None."""
    if not (_shown() and _on_terminal()):
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        MofNCompleteColumn(),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield bar


class _Handler(logging.Handler):
    """Log records on whatever stderr is now: a progress bar puts its own in place while it is on the screen."""

    def emit(self, record: logging.LogRecord) -> None:
        click.echo(self.format(record), err=True)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return f"{record.levelname.lower()}: {super().format(record)}"


def start_logging(level: int) -> None:
    """Sends this package's log to stderr. Calling it again only changes the level."""
    if not any(isinstance(handler, _Handler) for handler in log.handlers):
        handler = _Handler()
        handler.setFormatter(_Formatter("%(message)s"))
        log.addHandler(handler)
    log.setLevel(level)
