"""torch's normal random numbers without torch: the same seed gives the same picture as diffusers on the CPU.

Source: ATen/native/cpu/DistributionTemplates.h and ATen/core/DistributionsHelper.h (torch 2.13), where `randn` in
float32 takes one of two ways to the same Mersenne Twister. From 16 numbers on: float32 uniforms of 24 bits, Box-Muller
over blocks of 16. Below: double precision, one number at a time, with every second one kept for later.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from toolchain.errors import RequestError

BLOCK = 16


class Generator:
    """A stream of random numbers equal to `torch.Generator("cpu").manual_seed(seed)`.

    Draws continue one another, as they do in torch: two draws from one generator are not one draw of twice the size.
    """

    def __init__(self, seed: int) -> None:
        """`seed`: 0 to 2**64 - 1, of which torch uses the low 32 bits. RequestError otherwise."""
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**64:
            raise RequestError("the seed is not valid", expected="an integer from 0 to 2**64 - 1", got=repr(seed))
        self._words = np.random.RandomState(seed & 0xFFFFFFFF)
        self._kept: float | None = None

    def randn(self, shape: Sequence[int]) -> npt.NDArray[np.float32]:
        """Standard normal numbers of `shape`, contiguous; within 5e-7 of `torch.randn(shape, generator=generator)`.

        The reference is torch's vectorised code (x86). Where torch runs its scalar code, its angle is rounded once
        less and numbers differ by up to 3e-6.
        """
        count = math.prod(shape)
        if count < BLOCK:
            return np.array([self._one() for _ in range(count)], np.float32).reshape(shape)
        numbers = self._uniform(count)
        whole = count - count % BLOCK
        numbers[:whole] = _box_muller(numbers[:whole])
        if whole < count:
            # torch fills a tail by drawing the last 16 numbers again, over some that were ready.
            numbers[-BLOCK:] = _box_muller(self._uniform(BLOCK))
        return numbers.reshape(shape)

    def _uniform(self, count: int) -> npt.NDArray[np.float32]:
        words = self._words.randint(0, 2**32, size=count, dtype=np.uint32)
        return (words & np.uint32(0xFFFFFF)).astype(np.float32) * np.float32(2**-24)

    def _one(self) -> float:
        if self._kept is not None:
            number, self._kept = self._kept, None
            return number
        words = self._words.randint(0, 2**32, size=4, dtype=np.uint32).tolist()
        angle, radius = (((high << 32 | low) & (2**53 - 1)) * 2**-53 for high, low in (words[:2], words[2:]))
        angle, radius = 2 * math.pi * angle, math.sqrt(-2 * math.log1p(-radius))
        self._kept = radius * math.sin(angle)
        return radius * math.cos(angle)


def _box_muller(uniform: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """Uniform -> normal in blocks of 16: the first eight set the radius, the last eight the angle.

    float32 throughout: rounding the angle as torch does is what keeps the difference below 5e-7.
    """
    blocks = uniform.reshape(-1, 2, BLOCK // 2)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - blocks[:, 0]))
    angle = np.float32(2 * math.pi) * blocks[:, 1]
    normal = np.empty_like(blocks)
    np.multiply(radius, np.cos(angle), out=normal[:, 0])
    np.multiply(radius, np.sin(angle), out=normal[:, 1])
    return normal.reshape(-1)
