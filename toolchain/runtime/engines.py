"""The engines and buffers of one bucket, bound once: nothing is allocated after this."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

from toolchain.bundle import Bundle
from toolchain.engines import Backend, Engine, backend_of
from toolchain.errors import BundleError
from toolchain.recipe import Bucket

F32 = NDArray[np.float32]
Array = NDArray[np.generic]


def usable_backend(bundle: Bundle) -> Backend:
    """The bundle's backend. BundleError when its engines were built for another device or version."""
    backend = backend_of(bundle.backend)
    reason = backend.available() or backend.refuse(bundle.device)
    if reason:
        raise BundleError(
            "the bundle cannot run here",
            where=bundle.path,
            got=reason,
            hint="build it on this machine, from the same recipe",
        )
    return backend


def open_engine(bundle: Bundle, backend: Backend, component: str, bucket: Bucket) -> Engine:
    entry = bundle.engine(component, bucket)
    options = bundle.recipe.to_json()[backend.name]
    weights = {role: bundle.path / name for role, name in entry.weights.items()}
    return backend.open(bundle.path / entry.folder, weights, entry.spec, options)


class BoundEngine:
    """An engine with buffers of its own for every input and output."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.inputs: dict[str, Array] = {t.name: np.zeros(t.shape, t.dtype) for t in engine.spec.inputs}
        self.outputs: dict[str, Array] = {t.name: np.zeros(t.shape, t.dtype) for t in engine.spec.outputs}
        self._launch = engine.bind({**self.inputs, **self.outputs})

    def __call__(self, inputs: Mapping[str, Array]) -> dict[str, Array]:
        """Runs on copies of `inputs`; those that are not given keep what they held. The outputs are buffers."""
        for name, array in inputs.items():
            self.inputs[name][...] = array
        self._launch()
        return self.outputs

    def close(self) -> None:
        self._engine.close()


class BucketEngines:
    """Step, decoder and, where the bundle has one, encoder of a bucket.

    The state has two buffers, which the step's two launches swap.
    """

    def __init__(self, bucket: Bucket, step: Engine, decoder: Engine, encoder: Engine | None) -> None:
        self.bucket = bucket
        self._engines = [step, decoder]
        buffers: dict[str, Array] = {t.name: np.zeros(t.shape, t.dtype) for t in step.spec.inputs}
        self.states = (buffers.pop("state"), np.zeros(step.spec.input("state").shape, np.float32))
        self.counters = (buffers.pop("step"), np.zeros(1, np.int64))
        self.inputs = buffers
        self.pixels = np.zeros(decoder.spec.outputs[0].shape, np.uint8)
        self.encoder = None if encoder is None else BoundEngine(encoder)

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
        if self.encoder:
            self.encoder({})

    def close(self) -> None:
        for engine in self._engines:
            engine.close()
        if self.encoder:
            self.encoder.close()
