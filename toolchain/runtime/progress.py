"""What a callback is given while a call runs."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import RequestError

F32 = NDArray[np.float32]


class Look:
    """Reads the latents while a callback runs: later they would be another evaluation's, or another call's."""

    def __init__(self, read: Callable[[], F32]) -> None:
        self._read = read
        self._ended = False
        self._guard = threading.Lock()  # the callback may have handed it to another thread

    def __call__(self) -> F32:
        """A copy of the latents. RequestError after `end`."""
        with self._guard:
            if self._ended:
                raise RequestError(
                    "the latents of a step were read after its callback",
                    expected="progress.latents read while the callback runs",
                    hint="read them in the callback; they are a copy that may be kept",
                )
            return self._read()

    def end(self) -> None:
        """Ends the access, when the callback has returned."""
        with self._guard:
            self._ended = True


@dataclass(frozen=True)
class Progress:
    """What a callback is given after each evaluation of the network: on a GPU, after it was enqueued."""

    index: int
    total: int
    timestep: float
    read_latents: Callable[[], F32] = field(repr=False)

    @property
    def latents(self) -> F32:
        """A copy [B, C, h, w], to be read while the callback runs. On a GPU reading waits for the evaluation."""
        return self.read_latents()


Callback = Callable[[Progress], bool | None]
