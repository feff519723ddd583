"""Progress and log of TensorRT's builder, and how a build is cancelled. Imported by the builder's process alone.

TensorRT calls loggers and monitors from several threads. Their classes are made for the library at hand: a class of
its own module is what each of the two libraries takes.
"""

from __future__ import annotations

import re
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

Say = Callable[[dict[str, Any]], None]

EVERY_S = 0.1
SILENCE_S = 5.0
"""After so long without a message from the builder, progress is reported without a percentage."""
SEVERITIES = "FEWIV"
"""First letters of ILogger.Severity, from INTERNAL_ERROR (fatal) to VERBOSE."""
LAYERS = "Layers:"
ACTIVATIONS = re.compile(r"Total Activation Memory: (\d+) bytes")
CHATTER = "Thread context has not been set! Using global log stream."
"""What TensorRT for RTX 1.7.1 logs as a fatal error in each build, and is none."""


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Phases:
    """Progress of a build: its outermost phase and the share of it that is done.

    Phases are nested, run side by side, and may end before their last step.
    """

    def __init__(self, say: Say) -> None:
        self._say = say
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._shown: tuple[str, float] = ("", 0.0)
        self._told_at = self._heard_at = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def start(self, name: str, parent: str | None, steps: int) -> None:
        """A phase of so many steps begins, inside another or outermost."""
        with self._lock:
            self._phases[name] = _Phase(parent, max(1, steps))
            self._tell(name)

    def step(self, name: str, step: int) -> None:
        """A step of a phase is done, counted from 0."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = step + 1
                self._tell(name)

    def finish(self, name: str) -> None:
        """A phase is done."""
        with self._lock:
            if name in self._phases:
                self._phases[name].done = self._phases[name].steps
                self._tell(name)
                del self._phases[name]

    def _tell(self, name: str) -> None:
        root, share, seen = name, 0.0, {name}
        phase: _Phase | None = self._phases[name]
        while phase is not None:
            share = min(1.0, (phase.done + share) / phase.steps)
            parent = phase.parent
            known = parent in self._phases and parent not in seen  # phases of one name may lie in each other
            root, phase = (parent, self._phases[parent]) if parent is not None and known else (root, None)
            seen.add(root)
        if root == self._shown[0]:
            share = max(share, self._shown[1])  # of phases side by side, the one that is furthest
        now = self._heard_at = time.monotonic()
        if (root, share) != self._shown and (root != self._shown[0] or now - self._told_at >= EVERY_S or share == 1.0):
            self._shown, self._told_at = (root, share), now
            self._say({"phase": root, "share": share})

    def _watch(self) -> None:
        while True:
            time.sleep(SILENCE_S)
            with self._lock:
                silent = time.monotonic() - self._heard_at
                if self._phases and silent >= SILENCE_S:
                    self._say({"phase": f"{self._shown[0]}, one long step ({silent:.0f} s so far)", "share": None})


def make_monitor(trt: Any, say: Say, cancelled: threading.Event, between: Callable[[], None]) -> Any:
    """A progress monitor that reports to `say`, calls `between` after each phase, and cancels the build once
    `cancelled` is set."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        """TensorRT takes an exception for a cancellation, and takes None for one too."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._phases = Phases(say)

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases.start(phase_name, parent_phase, num_steps)

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._phases.step(phase_name, step)
            return not cancelled.is_set()

        def phase_finish(self, phase_name: str) -> None:
            self._phases.finish(phase_name)
            between()

    return Monitor()


def make_logger(trt: Any) -> Any:
    """A logger with TensorRT's messages on stderr, one line each, without its chatter.

    layers            the descriptions of the engine's layers, one document for each engine that was built
    activation_bytes  what the builder said last of the memory for activations
    """

    class Logger(trt.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.layers: list[str] = []
            self.activation_bytes: int | None = None

        def log(self, severity: Any, msg: str) -> None:
            if msg.startswith(LAYERS):
                self.layers.append(msg)
            if int(severity) >= int(trt.ILogger.Severity.VERBOSE) or msg == CHATTER:
                return
            match = ACTIVATIONS.search(msg)
            if match:
                self.activation_bytes = int(match[1])
            sys.stderr.write(f"[{SEVERITIES[int(severity)]}] {msg.rstrip()}\n")

    return Logger()
