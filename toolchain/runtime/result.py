"""What a call returns: pictures, latents and timings."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from toolchain.engines.buffers import Memory
from toolchain.runtime.progress import F32
from toolchain.runtime.request import Request
from toolchain.sampler.table import SamplerTable


@dataclass
class Timings:
    """Milliseconds per stage of one call, summed over its runs. On a GPU they are the stream's, not the host's.

    table_ms     compiling the sampler's table, 0 where the bundle has it or it was compiled before
    text_ms      prompts to conditions, of which tokenize_ms are the tokenizers'; next to nothing for known prompts
    encode_ms    drawing the noise and, for image to image, encoding the picture; uploading what the steps read
    denoise_ms   the loop; steps_ms are its evaluations
    launch_ms    what the host spent inside the launches of the loop; on a CPU that is the work itself
    total_ms     of the whole call, without its wait for calls that came before
    launches     how often an engine was launched
    """

    table_ms: float = 0.0
    text_ms: float = 0.0
    tokenize_ms: float = 0.0
    encode_ms: float = 0.0
    denoise_ms: float = 0.0
    launch_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0
    steps_ms: list[float] = field(default_factory=list)
    launches: int = 0

    def add(self, memory: Memory, marks: Sequence[Any], evaluated: Sequence[Any]) -> None:
        """Adds a run: marks at its start and after text, start, loop and decoder, and after each evaluation."""
        stages = [memory.elapsed_ms(*pair) for pair in itertools.pairwise(marks)]
        self.text_ms += stages[0]
        self.encode_ms += stages[1]
        self.denoise_ms += stages[2]
        self.decode_ms += stages[3]
        self.steps_ms += [memory.elapsed_ms(*pair) for pair in itertools.pairwise([marks[2], *evaluated])]


@dataclass(frozen=True)
class Result:
    """The result of one call.

    images   one per prompt, none without decoding
    latents  float32 [N, C, h, w] after the last step
    request  what ran, with every default filled in
    table    the sampler that it ran with
    flagged  per picture, whether the safety checker flagged it, which makes it black; None without checker or decoding
    """

    images: list[Image.Image]
    latents: F32
    request: Request
    table: SamplerTable
    timings: Timings
    flagged: list[bool] | None = None

    def __repr__(self) -> str:
        ran, (height, width) = self.request, self.request.size
        what = f"{len(self.images)} image{'' if len(self.images) == 1 else 's'}" if self.images else "latents"
        how = f"{ran.scheduler}, {ran.steps} steps, guidance {ran.guidance:g}"
        return f"<Result: {what} of {height}x{width}, {how}, seeds {ran.seeds}, {self.timings.total_ms:.0f} ms>"

    @property
    def seeds(self) -> list[int]:
        """One for each picture."""
        return self.request.seeds
