"""What a caller sees of a run while it goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from toolchain.errors import RequestError

F32 = NDArray[np.float32]


class Look:
    """Reads latents while the run stands still: later they would be another evaluation's, or another call's."""

    def __init__(self, read: Callable[[], F32]) -> None:
        self._read = read
        self._ended = False
        self._guard = threading.Lock()  # the callback may have handed it to another thread

    def __call__(self) -> F32:
        """RequestError after the end."""
        with self._guard:
            if self._ended:
                raise RequestError(
                    "the latents of a step were asked for after it",
                    expected="progress.latents while the callback runs",
                    hint="take them there; they are a copy that may be kept",
                )
            return self._read()

    def end(self) -> None:
        with self._guard:
            self._ended = True


@dataclass(frozen=True)
class Progress:
    """What a callback sees after each evaluation of the network: on a GPU, after it was enqueued."""

    index: int
    total: int
    timestep: float
    read_latents: Callable[[], F32] = field(repr=False)

    @property
    def latents(self) -> F32:
        """A copy [B, C, h, w], to be asked for while the callback runs. On a GPU asking waits for the evaluation."""
        return self.read_latents()


Callback = Callable[[Progress], bool | None]
