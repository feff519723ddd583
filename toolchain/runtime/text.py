"""Prompts -> conditions of the denoiser: tokenizers, text encoders and an LRU cache of their outputs."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from toolchain.bundle.bundle import Bundle
from toolchain.engines.backend import Runner
from toolchain.engines.buffers import Memory
from toolchain.runtime.engines import BoundEngine, closed_on_error, open_engine
from toolchain.runtime.observer import NOBODY, Observer
from toolchain.runtime.prompt import PromptTokenizer

log = logging.getLogger("toolchain")

CACHED = 256
CACHED_BYTES = 256 << 20
Conditions = dict[str, Any]
"""What one picture is conditioned on: input of the denoiser -> a buffer with its row, without the batch axis."""


class TextEncoders:
    """Every text encoder of a bundle, with an LRU cache of their outputs, which are named as the denoiser's inputs."""

    def __init__(self, bundle: Bundle, backend: Runner[Any], memory: Memory, observer: Observer = NOBODY) -> None:
        self._memory = memory
        # One batch's conditions must not push each other out before they are used.
        least = 2 * max(bucket.batch for bucket in bundle.buckets) + 1
        self._encoders: dict[str, _Encoder] = {}
        self._zeros: Conditions | None = None
        with closed_on_error(self.close):
            for name, folder in bundle.tokenizers.items():
                tokenizer = PromptTokenizer(bundle.path / folder)
                engine = open_engine(bundle, backend, name, bundle.buckets[0], memory, observer)
                self._encoders[name] = _Encoder(name, tokenizer, BoundEngine(engine, memory), memory, least, observer)

    @property
    def tokenize_ms(self) -> float:
        """Milliseconds of tokenizing since this was opened."""
        return sum(encoder.tokenize_ms for encoder in self._encoders.values())

    @property
    def launches(self) -> int:
        """Launches of text encoders since this was opened."""
        return sum(encoder.launches for encoder in self._encoders.values())

    def __call__(self, texts: Mapping[str, str], clip_skip: int) -> Conditions:
        """The conditions of one picture from the text of each encoder, valid until those of the next batch are asked
        for."""
        conditions: Conditions = {}
        for name, text in texts.items():
            conditions.update(self._encoders[name](text, clip_skip))
        return conditions

    def zeros(self) -> Conditions:
        """Zeros in place of a negative prompt's conditions, for models that were trained so."""
        if self._zeros is None:
            self._zeros = {name: row for encoder in self._encoders.values() for name, row in encoder.rows().items()}
        return self._zeros

    def forget(self) -> None:
        """Empties the cache."""
        for encoder in self._encoders.values():
            encoder.forget()

    def close(self) -> None:
        """Closes the engines and frees their buffers."""
        for encoder in self._encoders.values():
            encoder.close()


class _Encoder:
    """One tokenizer and text encoder, with an LRU cache of conditions that uses evicted buffers again."""

    def __init__(
        self,
        name: str,
        tokenizer: PromptTokenizer,
        engine: BoundEngine,
        memory: Memory,
        least: int,
        observer: Observer,
    ) -> None:
        self._name, self._tokenizer, self._engine, self._memory = name, tokenizer, engine, memory
        self._observer = observer
        self._known: OrderedDict[tuple[str, int], Conditions] = OrderedDict()
        self._free: list[Conditions] = []
        row_bytes = sum(int(np.prod(o.shape)) * o.dtype.itemsize for o in engine.outputs.values())
        self._capacity = max(least, min(CACHED, CACHED_BYTES // row_bytes))
        self.tokenize_ms = 0.0
        self.launches = 0

    def rows(self) -> Conditions:
        """New buffers for one text's conditions, of zeros."""
        return {name: self._memory.zeros(o.shape[1:], o.dtype) for name, o in self._engine.outputs.items()}

    def __call__(self, text: str, clip_skip: int) -> Conditions:
        skips = "clip_skip" in self._engine.inputs
        key = (text, clip_skip if skips else 0)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        started = time.perf_counter()
        with self._observer.stage("tokenize"):
            encoded = self._tokenizer.encode(text)
        self.tokenize_ms += (time.perf_counter() - started) * 1e3
        if encoded.cut:
            length = encoded.ids.shape[1]
            log.warning("the prompt is longer than the %d tokens of %s; cut: %r", length, self._name, encoded.cut)
        given = {"ids": encoded.ids, "mask": encoded.mask, "clip_skip": clip_skip}
        inputs: dict[str, Any] = {name: given[name] for name in self._engine.inputs}
        outputs = self._engine(inputs)
        self.launches += 1
        conditions = self._room()
        for name, row in conditions.items():
            self._memory.copy(row, outputs[name][0])
        self._known[key] = conditions
        return conditions

    def _room(self) -> Conditions:
        if len(self._known) >= self._capacity:
            return self._known.popitem(last=False)[1]
        return self._free.pop() if self._free else self.rows()

    def forget(self) -> None:
        self._free += self._known.values()
        self._known.clear()

    def close(self) -> None:
        self._engine.close()


def place(
    memory: Memory, inputs: Mapping[str, Any], negatives: Sequence[Conditions], positives: Sequence[Conditions]
) -> None:
    """Copies conditions into the denoiser's inputs [rows, ...]: the negatives' rows first, where there are any."""
    for name in positives[0]:
        for row, conditions in enumerate((*negatives, *positives)):
            memory.copy(inputs[name][row], conditions[name])
