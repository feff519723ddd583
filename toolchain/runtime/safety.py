"""The safety checker of a bundle, and its preprocessing without transformers."""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.bundle.bundle import Bundle
from toolchain.engines.backend import Runner
from toolchain.engines.buffers import Memory
from toolchain.runtime.engines import F32, BoundEngine, open_engine
from toolchain.runtime.observer import NOBODY, Observer
from toolchain.settings import SafetyInput

COMPONENT = "safety_checker"
log = logging.getLogger("toolchain")


class SafetyChecker:
    """The checker of a bundle that has one."""

    def __init__(self, bundle: Bundle, backend: Runner[Any], memory: Memory, observer: Observer = NOBODY) -> None:
        assert bundle.settings.safety is not None
        self._settings, self._memory = bundle.settings.safety, memory
        engine = open_engine(bundle, backend, COMPONENT, bundle.buckets[0], memory, observer)
        self._engine = BoundEngine(engine, memory)

    def __call__(self, pixels: NDArray[np.uint8]) -> list[bool]:
        """Which of the pictures [N, H, W, 3] are flagged."""
        flagged = []
        for picture in pixels:
            outputs = self._engine({"image": prepare(picture, self._settings)})
            flagged.append(bool(self._memory.read(outputs["flagged"])[0][0]))
        return flagged

    def close(self) -> None:
        """Closes the engine."""
        self._engine.close()


def tell(flagged: list[bool]) -> None:
    """Logs a warning for flagged pictures."""
    if any(flagged):
        log.warning("the safety checker flagged %d of %d pictures: they are black", sum(flagged), len(flagged))


def prepare(pixels: NDArray[np.uint8], settings: SafetyInput) -> F32:
    """A picture [H, W, 3] as transformers' CLIPImageProcessor prepares it without torchvision: [1, 3, S, S]."""
    height, width = pixels.shape[:2]
    short = min(height, width)
    # As transformers computes it: the longer side is cut off, not rounded.
    size = (int(settings.resize * width / short), int(settings.resize * height / short))
    resized = np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC))
    top, left = ((side - settings.crop) // 2 for side in resized.shape[:2])
    cropped = resized[top : top + settings.crop, left : left + settings.crop]
    scaled = (cropped * np.float64(1 / 255)).astype(np.float32)
    normal = (scaled - np.array(settings.mean, np.float32)) / np.array(settings.std, np.float32)
    return np.ascontiguousarray(normal.transpose(2, 0, 1)[None], np.float32)
