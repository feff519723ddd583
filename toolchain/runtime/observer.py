"""Who watches a pipeline at work: a profiler, a service's metrics. Without an observer nothing is wrapped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

from toolchain.engines.backend import Buffers, Engine
from toolchain.errors import RequestError

Scope = AbstractContextManager[object]
_NOTHING: Scope = nullcontext()


class Observer(Protocol):
    """Gives a context manager for each stage, evaluation and engine call: subclass it and override what you need.

    It is entered before and left after, in the thread of the call, which holds the pipeline's lock: the observer of one
    pipeline needs no lock of its own, and may not use the pipeline. An error that it raises ends the call, and the
    pipeline stays usable. It must not suppress errors.

    On a GPU these scopes are the host's: work is only enqueued inside them, and an observer must not wait for it; how
    long the GPU took is in `Result.timings`. Evaluations are launched one by one, as with a callback.
    """

    def stage(self, name: str) -> Scope:
        """A stage of a call.

        table     compiling the sampler's table, where the bundle has it not
        text      prompts to conditions; inside it, for each new prompt, tokenize
        upload    drawing the noise, encoding an image, uploading
        denoise   the loop
        decode    latents to pixels
        safety    the safety checker, where the bundle has one

        A warm-up has stages of its own; `Pipeline.encode` and `Pipeline.decode` have none.
        """
        return _NOTHING

    def evaluation(self, index: int, total: int, timestep: float) -> Scope:
        """Evaluation `index` of `total` of the denoising loop, counted from 0."""
        return _NOTHING

    def engine(self, name: str) -> Scope:
        """One launch of an engine, such as "text_encoder" or "denoiser 1x512x512"; those of a warm-up too."""
        return _NOTHING


class _Nobody(Observer):
    pass


NOBODY = _Nobody()


def check_observer(observer: Observer | None) -> Observer:
    """The observer, or one that sees nothing. Raises RequestError for an object without an observer's methods."""
    if observer is None:
        return NOBODY
    if isinstance(observer, type) or not all(hasattr(observer, name) for name in ("stage", "evaluation", "engine")):
        raise RequestError(
            "the observer has not an observer's methods",
            expected="an object of a subclass of toolchain.Observer",
            got=observer,
        )
    return observer


class ObservedEngine:
    """An engine whose launches are an observer's engine calls."""

    def __init__(self, engine: Engine, name: str, observer: Observer) -> None:
        self.spec = engine.spec
        self._engine, self._name, self._observer = engine, name, observer

    def bind(self, buffers: Buffers) -> Callable[[], None]:
        """As `Engine.bind`."""
        launch, name, observer = self._engine.bind(buffers), self._name, self._observer

        def observed() -> None:
            with observer.engine(name):
                launch()

        return observed

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()


def observed(steps: Iterator[int], timesteps: list[float], observer: Observer) -> Iterator[int]:
    """The indices that `steps` yields, each after an evaluation, which the observer sees."""
    for index, timestep in enumerate(timesteps):
        with observer.evaluation(index, len(timesteps), timestep):
            next(steps)
        yield index
