"""The engines and buffers of one bucket, bound once: nothing is allocated after this."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from toolchain.bundle import Bundle
from toolchain.engines import Backend, Engine
from toolchain.recipe import Bucket

F32 = NDArray[np.float32]


def open_engine(bundle: Bundle, backend: Backend, component: str, bucket: Bucket) -> Engine:
    entry = bundle.engine(component, bucket)
    options = bundle.recipe.to_json()[backend.name]
    weights = {role: bundle.path / name for role, name in entry.weights.items()}
    return backend.open(bundle.path / entry.folder, weights, entry.spec, options)


class TextEncoder:
    """Token ids [1, L] -> context [L, E], one prompt at a time."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._ids, self._context = (np.zeros(t.shape, t.dtype) for t in (engine.spec.inputs[0], engine.spec.outputs[0]))
        self._launch = engine.bind({"ids": self._ids, "context": self._context})

    def __call__(self, ids: NDArray[np.int64]) -> F32:
        self._ids[...] = ids
        self._launch()
        return np.array(self._context[0], np.float32)

    def close(self) -> None:
        self._engine.close()


class BucketEngines:
    """Step and decoder of one bucket. The state has two buffers, which the step's two launches swap."""

    def __init__(self, bucket: Bucket, step: Engine, decoder: Engine) -> None:
        self.bucket = bucket
        self._engines = (step, decoder)
        buffers: dict[str, NDArray[np.generic]] = {t.name: np.zeros(t.shape, t.dtype) for t in step.spec.inputs}
        self.states = (buffers.pop("state"), np.zeros(step.spec.input("state").shape, np.float32))
        self.counters = (buffers.pop("step"), np.zeros(1, np.int64))
        self.inputs = buffers
        self.pixels = np.zeros(decoder.spec.outputs[0].shape, np.uint8)

        def bind_step(source: int, target: int) -> Callable[[], None]:
            ends = {"state": self.states[source], "next_state": self.states[target]}
            counters = {"step": self.counters[source], "next_step": self.counters[target]}
            return step.bind({**self.inputs, **ends, **counters})

        self.steps = (bind_step(0, 1), bind_step(1, 0))
        self.decoders = tuple(decoder.bind({"latents": state[0], "pixels": self.pixels}) for state in self.states)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[B, C, h, w] of the latents."""
        return self.states[0].shape[1:]

    def warm_up(self) -> None:
        """Runs everything once on zeros, so that the first request finds pages and threads in place."""
        self.steps[0]()
        self.decoders[1]()

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
