"""The engines and buffers of one bucket, bound once: nothing is allocated after this."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.bundle.signing import vouch
from toolchain.engines.backend import Engine, Runner
from toolchain.engines.buffers import Memory
from toolchain.engines.runners import runner_of
from toolchain.errors import BundleError
from toolchain.recipe import Bucket
from toolchain.runtime.observer import NOBODY, ObservedEngine, Observer
from toolchain.signature import TensorSpec

F32 = NDArray[np.float32]


def usable_backend(bundle: Bundle, backend: Runner[Any] | None = None) -> Runner[Any]:
    """The bundle's backend, or `backend` in its place. Raises BundleError if it cannot run, for engines of another
    device or version, and for untrusted machine code."""
    backend = backend or runner_of(bundle.backend)
    reason, otherwise = backend.available(), "diffbuild doctor shows what each backend needs"
    if reason is None:
        reason = backend.refuse(bundle.device, bundle.recipe.options(backend.name))
        otherwise = "build it on this machine, from the same recipe"
    if reason is not None:
        hint = backend.install(bundle.device) or otherwise
        raise BundleError("the bundle cannot run here", where=bundle.path, got=reason, hint=hint)
    if bundle.machine_code and not bundle.vouched:
        vouch(bundle)
    return backend


def open_memory(bundle: Bundle, backend: Runner[Any], open_buckets: int | None = None) -> Memory:
    """The memory of a pipeline over this bundle that keeps `open_buckets` open, None: all. Raises EngineError."""
    folders = {bundle.path / entry.folder for by_bucket in bundle.engines.values() for entry in by_bucket.values()}
    return backend.memory(sorted(folders), bundle.recipe.options(backend.name), open_buckets)


def open_engine(
    bundle: Bundle,
    backend: Runner[Any],
    component: str,
    bucket: Bucket,
    memory: Memory,
    observer: Observer = NOBODY,
) -> Engine:
    """The engine of a component for a bucket. Raises BundleError and EngineError."""
    entry = bundle.engine(component, bucket)
    options = bundle.recipe.options(backend.name)
    weights = {role: bundle.path / name for role, name in entry.weights.items()}
    engine = backend.open(bundle.path / entry.folder, weights, entry.spec, options, memory)
    if observer is NOBODY:
        return engine
    name = component if ANY in bundle.engines[component] else f"{component} {bucket}"
    return ObservedEngine(engine, name, observer)


@contextmanager
def closed_on_error(close: Callable[[], None]) -> Iterator[None]:
    """Calls `close` when the block fails, so that a server may try again on the same GPU."""
    try:
        yield
    except BaseException:
        close()
        raise


class BoundEngine:
    """An engine with a buffer for every input and output. It owns the engine: `close` closes both."""

    def __init__(self, engine: Engine, memory: Memory) -> None:
        self._engine, self._memory, self.spec = engine, memory, engine.spec
        self.inputs: dict[str, Any] = {}
        self.outputs: dict[str, Any] = {}
        with closed_on_error(self.close):
            for buffers, tensors in ((self.inputs, engine.spec.inputs), (self.outputs, engine.spec.outputs)):
                for t in tensors:
                    buffers[t.name] = memory.zeros(t.shape, t.dtype)
            self._launch = engine.bind({**self.inputs, **self.outputs})

    def __call__(self, inputs: Mapping[str, ArrayLike]) -> dict[str, Any]:
        """Copies `inputs` into their buffers, launches, and returns the output buffers. Inputs that are not given keep
        their values."""
        for name, array in inputs.items():
            self._memory.write(self.inputs[name], array)
        self._launch()
        return self.outputs

    def close(self) -> None:
        """Closes the engine and frees its buffers."""
        self._engine.close()
        self._memory.free(*self.inputs.values(), *self.outputs.values())


class BucketEngines:
    """Step, decoder and, where the bundle has one, encoder of a bucket.

    The state has two buffers, which the step's two launches swap.
    """

    def __init__(self, memory: Memory, opened: Callable[[str], Engine], *, with_encoder: bool) -> None:
        """`opened` opens the engine of a component. Raises what it raises, and EngineError."""
        self.memory = memory
        self.encoder: BoundEngine | None = None
        self._engines: list[Engine] = []
        self._buffers: list[Any] = []
        with closed_on_error(self.close):
            self._bind(opened)
            if with_encoder:
                self.encoder = BoundEngine(opened("vae_encoder"), memory)

    def _bind(self, opened: Callable[[str], Engine]) -> None:
        def engine(name: str) -> Engine:
            self._engines.append(opened(name))
            return self._engines[-1]

        def zeros(tensor: TensorSpec) -> Any:
            self._buffers.append(self.memory.zeros(tensor.shape, tensor.dtype))
            return self._buffers[-1]

        step, decoder = engine("denoiser"), engine("vae_decoder")
        self.inputs = {tensor.name: zeros(tensor) for tensor in step.spec.inputs}
        self.states = (self.inputs.pop("state"), zeros(step.spec.input("state")))
        self.counters = (self.inputs.pop("step"), zeros(step.spec.input("step")))
        self.pixels = zeros(decoder.spec.outputs[0])

        def bind_step(source: int, target: int) -> Callable[[], None]:
            ends = {"state": self.states[source], "next_state": self.states[target]}
            counters = {"step": self.counters[source], "next_step": self.counters[target]}
            return step.bind({**self.inputs, **ends, **counters})

        self.steps = (bind_step(0, 1), bind_step(1, 0))
        self.run = self.memory.loop(*self.steps)
        self.decoders = tuple(decoder.bind({"latents": state[0], "pixels": self.pixels}) for state in self.states)

    @property
    def latent_shape(self) -> tuple[int, ...]:
        """[B, C, h, w] of the latents."""
        return tuple(self.states[0].shape[1:])

    def warm_up(self) -> None:
        """Runs everything once on zeros, so that the first request finds pages and threads in place."""
        self.steps[0]()
        self.decoders[1]()
        if self.encoder:
            self.encoder({})
        self.memory.read()

    def close(self) -> None:
        """Closes the engines and frees their buffers."""
        for engine in self._engines:
            engine.close()
        if self.encoder:
            self.encoder.close()
        self.memory.free(*self._buffers)
