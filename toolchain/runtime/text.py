"""Prompts -> what the denoiser is conditioned on: tokenizers, text encoders and a cache of their results."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence

import numpy as np

from toolchain.bundle import Bundle
from toolchain.engines import Backend
from toolchain.runtime.engines import F32, Array, BoundEngine, open_engine
from toolchain.runtime.prompt import PromptTokenizer

log = logging.getLogger("toolchain")

CACHED = 256
Conditions = dict[str, F32]
"""What one picture is conditioned on: input of the denoiser -> its row, without the batch axis."""


class TextEncoders:
    """Every text encoder of a bundle. Their outputs are named as the denoiser's inputs.

    tokenize_ms, launches  what tokenizing took and how often an engine ran, since this was opened
    """

    def __init__(self, bundle: Bundle, backend: Backend) -> None:
        self._tokenizers = {name: PromptTokenizer(bundle.path / place) for name, place in bundle.tokenizers.items()}
        self._engines = {
            name: BoundEngine(open_engine(bundle, backend, name, bundle.buckets[0])) for name in bundle.tokenizers
        }
        self._known: OrderedDict[tuple[str, str, int], Conditions] = OrderedDict()
        self.tokenize_ms = 0.0
        self.launches = 0

    def __call__(self, texts: Mapping[str, str], clip_skip: int) -> Conditions:
        """The conditions of one picture from the text of each encoder."""
        found: Conditions = {}
        for name, text in texts.items():
            found.update(self._encode(name, text, clip_skip))
        return found

    def zeros(self) -> Conditions:
        """In place of a negative prompt, for models that were trained so."""
        return {k: np.zeros(v.shape[1:], np.float32) for e in self._engines.values() for k, v in e.outputs.items()}

    def _encode(self, name: str, text: str, clip_skip: int) -> Conditions:
        engine = self._engines[name]
        skips = "clip_skip" in engine.inputs
        key = (name, text, clip_skip if skips else 0)
        if key in self._known:
            self._known.move_to_end(key)
            return self._known[key]
        started = time.perf_counter()
        encoded = self._tokenizers[name].encode(text)
        self.tokenize_ms += (time.perf_counter() - started) * 1e3
        if encoded.cut:
            log.warning(
                "the prompt is longer than the %d tokens of %s; cut: %r", encoded.ids.shape[1], name, encoded.cut
            )
        inputs: dict[str, Array] = {"ids": encoded.ids}
        if skips:
            inputs["clip_skip"] = np.array([clip_skip], np.int64)
        outputs = engine(inputs)
        self.launches += 1
        made = self._known[key] = {k: np.array(v[0], np.float32) for k, v in outputs.items()}
        if len(self._known) > CACHED:
            self._known.popitem(last=False)
        return made

    def forget(self) -> None:
        """Empties the cache."""
        self._known.clear()

    def close(self) -> None:
        for engine in self._engines.values():
            engine.close()


def place(inputs: Mapping[str, Array], negatives: Sequence[Conditions], positives: Sequence[Conditions]) -> None:
    """Writes conditions into the denoiser's inputs [rows, ...]: the negatives' rows first, where there are any."""
    for name in positives[0]:
        inputs[name][...] = np.stack([c[name] for c in (*negatives, *positives)])
