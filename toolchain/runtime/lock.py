"""A lock that is granted in first-in, first-out order."""

from __future__ import annotations

import threading
from collections import deque

from toolchain.errors import RequestError


class FairLock:
    """A lock that goes to the thread that has waited longest; `threading.Lock` may starve one.

    RequestError for a thread that holds it already, which would wait for itself.
    """

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._holder: int | None = None
        self._waiting: deque[tuple[int, threading.Lock]] = deque()

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._holder == me:  # which no other thread can make true or false
            raise RequestError(
                "a pipeline was called from inside its own call",
                got="a callback or observer that uses the pipeline which is calling it",
                hint="use it when the call has returned, or load a second pipeline",
            )
        turn = threading.Lock()
        with self._guard:
            if self._holder is None:
                self._holder = me
                return
            turn.acquire()
            self._waiting.append((me, turn))
        try:
            turn.acquire()  # until the one before hands over
        except BaseException:  # an interrupt; whoever stands behind must not wait for a thread that has left
            with self._guard:
                handed = self._holder == me
                if not handed:
                    self._waiting.remove((me, turn))
            if handed:
                self._hand_over()
            raise

    def __exit__(self, *_: object) -> None:
        self._hand_over()

    def _hand_over(self) -> None:
        with self._guard:
            self._holder, turn = self._waiting.popleft() if self._waiting else (None, None)
        if turn is not None:
            turn.release()
