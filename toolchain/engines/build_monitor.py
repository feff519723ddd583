"""How far TensorRT's builder is, and the way to stop it. Imported by the builder's process alone."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import tensorrt as trt

EVERY_S = 0.1


@dataclass
class _Phase:
    parent: str | None
    steps: int
    done: int = 0


class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
    """Tells the outermost phase and how much of it is done, and cancels the build once `cancelled` is set.

    Phases are nested, run side by side, and may end before their last step. TensorRT calls from several threads, takes
    an exception for a cancellation, and takes None for one too.
    """

    def __init__(self, say: Callable[[dict[str, Any]], None], cancelled: threading.Event) -> None:
        trt.IProgressMonitor.__init__(self)
        self._say, self._cancelled = say, cancelled
        self._lock = threading.Lock()
        self._phases: dict[str, _Phase] = {}
        self._shown: tuple[str, float] = ("", 0.0)
        self._told_at = 0.0

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
        with self._lock:
            self._phases[phase_name] = _Phase(parent_phase, max(1, num_steps))
            self._tell(phase_name)

    def step_complete(self, phase_name: str, step: int) -> bool:
        with self._lock:
            if phase_name in self._phases:
                self._phases[phase_name].done = step + 1
                self._tell(phase_name)
        return not self._cancelled.is_set()

    def phase_finish(self, phase_name: str) -> None:
        with self._lock:
            if phase_name in self._phases:
                self._phases[phase_name].done = self._phases[phase_name].steps
                self._tell(phase_name)
                del self._phases[phase_name]

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
        now = time.monotonic()
        if (root, share) != self._shown and (root != self._shown[0] or now - self._told_at >= EVERY_S or share == 1.0):
            self._shown, self._told_at = (root, share), now
            self._say({"phase": root, "share": share})
