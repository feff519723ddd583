"""Bundle -> pictures, without torch, diffusers, transformers or onnx."""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.bundle import Bundle, describe_buckets, read_bundle
from toolchain.engines import backend_of
from toolchain.errors import BundleError, RequestError
from toolchain.recipe import Bucket
from toolchain.runtime.engines import F32, BucketEngines, TextEncoder, open_engine
from toolchain.runtime.loop import denoise
from toolchain.runtime.noise import Generator
from toolchain.runtime.prompt import ClipTokenizer
from toolchain.runtime.request import Request, check_guidance, check_latents, check_seeds, check_steps, check_texts
from toolchain.sampler.schedulers import parse
from toolchain.sampler.table import SamplerTable

log = logging.getLogger("toolchain")

CACHED_PROMPTS = 256
CACHED_TABLES = 64


@dataclass(frozen=True)
class Progress:
    """What a callback sees after each evaluation of the network. `latents` [B, C, h, w] is a view, to be copied."""

    index: int
    total: int
    timestep: float
    latents: F32


Callback = Callable[[Progress], bool | None]


@dataclass
class Timings:
    """Milliseconds per stage of one call, summed over its runs."""

    text_ms: float = 0.0
    denoise_ms: float = 0.0
    decode_ms: float = 0.0
    total_ms: float = 0.0
    steps_ms: list[float] = field(default_factory=list)


@dataclass(frozen=True)
class Result:
    """One call's outcome.

    images   one per prompt, none without decoding
    latents  float32 [N, C, h, w] after the last step
    request  what ran, with every default filled in
    """

    images: list[Image.Image]
    latents: F32
    request: Request
    timings: Timings

    @property
    def seeds(self) -> list[int]:
        return self.request.seeds


class Pipeline:
    """A loaded bundle. Not safe for concurrent calls: load one per worker; the weights are mapped and shared."""

    def __init__(self, bundle: Bundle, *, warm_up: bool = True) -> None:
        """Opens the text encoder and, with `warm_up`, every bucket, and runs each engine once.

        Raises BundleError when the engines were built for another device or version.
        """
        self.bundle = bundle
        self._backend = backend_of(bundle.backend)
        reason = self._backend.available() or self._backend.refuse(bundle.device)
        if reason:
            raise BundleError(
                "the bundle cannot run here",
                where=bundle.path,
                got=reason,
                hint="build it on this machine, from the same recipe",
            )
        self._tokenizer = ClipTokenizer(bundle.path / bundle.tokenizers["tokenizer"])
        self._text = TextEncoder(open_engine(bundle, self._backend, "text_encoder", bundle.buckets[0]))
        self._buckets: dict[Bucket, BucketEngines] = {}
        self._contexts: OrderedDict[str, F32] = OrderedDict()
        self._tables: OrderedDict[tuple[str, int], SamplerTable] = OrderedDict()
        if warm_up:
            self._context("")
            for bucket in bundle.buckets:
                self._engines(bucket).warm_up()

    def __call__(
        self,
        prompt: str | Sequence[str],
        *,
        negative_prompt: str | Sequence[str] = "",
        seed: int | Sequence[int] | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        scheduler: str | None = None,
        size: tuple[int, int] | None = None,
        crop: bool = False,
        latents: F32 | None = None,
        decode: bool = True,
        callback: Callback | None = None,
    ) -> Result:
        """Pictures for one prompt or several.

        seed        one per picture; a single one counts up over the pictures; None draws one at random
        guidance    classifier-free guidance scale; 1 or less is none, as in diffusers
        scheduler   a name as in `--scheduler`; without a table in the bundle it is compiled, where diffusers is there
        size        (height, width) in pixels, one of the built buckets
        crop        take the nearest larger bucket and cut the middle out of it
        latents     float32 [N, C, h, w], standard normal, in place of the seed's
        decode      False leaves the VAE out: the latents are the result
        callback    called after each evaluation; returning False stops the run there

        What a seed draws is what torch's CPU generator draws: the picture is diffusers' own with one generator each.
        Raises RequestError for anything the bundle cannot do.
        """
        started = time.perf_counter()
        timings = Timings()
        request = self._request(prompt, negative_prompt, seed, steps, guidance, scheduler, size, latents)
        bucket_size = self._bucket_size(request.size, crop)
        images: list[Image.Image] = []
        parts: list[F32] = []
        first = 0
        for batch in self._batches(len(request.prompts), bucket_size):
            count = min(batch, len(request.prompts) - first)
            engines = self._engines(Bucket(batch, *bucket_size))
            chosen = [first + min(i, count - 1) for i in range(batch)]  # a part-filled batch repeats its last picture
            pixels, result = self._run(engines, request, chosen, decode, callback, timings)
            parts.append(result[:count])
            images += [_crop(Image.fromarray(p), request.size) for p in pixels[:count]]
            first += count
        timings.total_ms = (time.perf_counter() - started) * 1e3
        return Result(images, np.concatenate(parts), request, timings)

    def close(self) -> None:
        """Frees every engine."""
        self._text.close()
        for engines in self._buckets.values():
            engines.close()
        self._buckets.clear()

    def table(self, scheduler: str, steps: int) -> SamplerTable:
        """The sampler table for a scheduler and a number of steps, from the bundle or compiled now."""
        name = parse(scheduler).canonical
        known = self._tables.get((name, steps))
        if known is None:
            known = self._tables[name, steps] = self._load_table(name, steps)
            if len(self._tables) > CACHED_TABLES:
                self._tables.popitem(last=False)
        return known

    def _load_table(self, name: str, steps: int) -> SamplerTable:
        file = self.bundle.samplers.get(f"{name}/{steps}")
        if file is not None:
            path = self.bundle.path / file
            try:
                return SamplerTable.from_json(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError) as error:
                raise BundleError("a sampler table cannot be read", where=path, got=error) from error
        try:
            from toolchain.sampler.compile import compile_table

            return compile_table(name, steps, self.bundle.settings["scheduler"])
        except ImportError:
            raise RequestError(
                "the bundle has no table for this scheduler and number of steps",
                expected=", ".join(sorted(self.bundle.samplers)),
                got=f"{name}/{steps}",
                hint="add it to the recipe and build again, or install diffbuild[build] to compile it here",
            ) from None

    def _request(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str],
        seed: int | Sequence[int] | None,
        steps: int | None,
        guidance: float | None,
        scheduler: str | None,
        size: tuple[int, int] | None,
        latents: F32 | None,
    ) -> Request:
        defaults = self.bundle.recipe.sampling
        prompts = check_texts("prompt", prompt)
        negatives = check_texts("negative_prompt", negative_prompt)
        if len(negatives) == 1:
            negatives = negatives * len(prompts)
        if len(negatives) != len(prompts):
            raise RequestError(
                "as many negative prompts as prompts are needed", expected=len(prompts), got=len(negatives)
            )
        if any(negatives) and not self._guided:
            hint = "set classifier_free_guidance = true in the recipe and build again"
            raise RequestError("a bundle without guidance cannot use a negative prompt", got=negatives[0], hint=hint)
        if scheduler is not None and not isinstance(scheduler, str):
            raise RequestError("scheduler is not a name", expected="a string such as 'euler'", got=repr(scheduler))
        steps = check_steps(defaults.steps if steps is None else steps)
        return Request(
            prompts,
            negatives,
            check_seeds(seed, len(prompts)),
            self.table(scheduler or defaults.scheduler, steps),
            check_guidance(self._default_guidance if guidance is None else guidance, self._guided),
            size or (self.bundle.buckets[0].height, self.bundle.buckets[0].width),
            check_latents(latents),
        )

    def _bucket_size(self, size: tuple[int, int], crop: bool) -> tuple[int, int]:
        """(height, width) of the buckets to run, in pixels."""
        if not (isinstance(size, tuple) and len(size) == 2 and all(type(s) is int and s > 0 for s in size)):
            raise RequestError("size is not a size", expected="(height, width) in pixels", got=repr(size))
        sizes = {(b.height, b.width) for b in self.bundle.buckets}
        if size in sizes:
            return size
        larger = [s for s in sizes if s[0] >= size[0] and s[1] >= size[1]]
        if crop and larger:
            return min(larger, key=lambda s: (s[0] * s[1], s))
        raise RequestError(
            "no engine was built for this size",
            where=self.bundle.path,
            expected=describe_buckets(self.bundle.buckets) + " (batch x height x width)",
            got=f"{size[0]}x{size[1]}",
            hint="cut it out of the nearest larger bucket with --crop (crop=True)"
            if larger
            else "add the bucket to the recipe and build again",
        )

    def _batches(self, count: int, size: tuple[int, int]) -> list[int]:
        """Bucket batches that together hold `count` pictures: the largest that fit, then the smallest."""
        built = sorted({b.batch for b in self.bundle.buckets if (b.height, b.width) == size})
        batches = []
        while count > 0:
            batch = max((b for b in built if b <= count), default=built[0])
            batches.append(batch)
            count -= batch
        return batches

    def _engines(self, bucket: Bucket) -> BucketEngines:
        if bucket not in self._buckets:
            opened = [open_engine(self.bundle, self._backend, name, bucket) for name in ("denoiser", "vae_decoder")]
            self._buckets[bucket] = BucketEngines(bucket, *opened)
        return self._buckets[bucket]

    def _context(self, prompt: str) -> F32:
        """The prompt's embedding [L, E], from the cache or the text encoder."""
        known = self._contexts.get(prompt)
        if known is not None:
            self._contexts.move_to_end(prompt)
            return known
        encoded = self._tokenizer.encode(prompt)
        if encoded.cut:
            log.warning(
                "the prompt is longer than the text encoder's %d tokens; cut: %r", encoded.ids.shape[1], encoded.cut
            )
        context = self._contexts[prompt] = self._text(encoded.ids)
        if len(self._contexts) > CACHED_PROMPTS:
            self._contexts.popitem(last=False)
        return context

    def _run(
        self,
        engines: BucketEngines,
        request: Request,
        chosen: list[int],
        decode: bool,
        callback: Callback | None,
        timings: Timings,
    ) -> tuple[NDArray[np.uint8], F32]:
        """One pass through a bucket for the pictures `chosen`: pixels [B, H, W, 3] and latents [B, C, h, w]."""
        clock = _Clock()
        negatives = [self._context(request.negatives[i]) for i in chosen] if self._guided else []
        engines.inputs["context"][...] = np.stack(negatives + [self._context(request.prompts[i]) for i in chosen])
        timings.text_ms += clock.lap_ms()
        table = request.table
        generators = [Generator(request.seeds[i]) for i in chosen]
        _upload(engines, table, request, chosen, generators)
        total = table.evaluations
        done = 0
        for index in denoise(engines.steps, table.noise_draws, lambda: _draw(engines.inputs["noise"], generators)):
            done = index + 1
            timings.steps_ms.append(clock.split_ms())
            if callback is not None:
                progress = Progress(index, total, float(table.timesteps[index]), engines.states[done % 2][0])
                if callback(progress) is False:
                    break
        timings.denoise_ms += clock.lap_ms()
        if decode:
            engines.decoders[done % 2]()
        timings.decode_ms += clock.lap_ms()
        return (engines.pixels.copy() if decode else engines.pixels[:0]), engines.states[done % 2][0].copy()

    @property
    def _default_guidance(self) -> float:
        return self.bundle.recipe.sampling.guidance if self._guided else 1.0

    @property
    def _guided(self) -> bool:
        return self.bundle.recipe.classifier_free_guidance


class _Clock:
    def __init__(self) -> None:
        self._lap = self._split = time.perf_counter()

    def split_ms(self) -> float:
        now = time.perf_counter()
        elapsed, self._split = now - self._split, now
        return elapsed * 1e3

    def lap_ms(self) -> float:
        now = time.perf_counter()
        elapsed, self._lap, self._split = now - self._lap, now, now
        return elapsed * 1e3


def load(path: str | Path, *, verify: bool = True, warm_up: bool = True) -> Pipeline:
    """Opens a bundle.

    verify   compare every file with its sha256 first; leave it on unless the bundle was just verified
    warm_up  open every bucket and run each engine once, so that the first request is as fast as the others

    Raises BundleError for a bundle that is damaged, of a newer format, or built for another device or version.
    """
    bundle = read_bundle(Path(path))
    if verify:
        bundle.verify()
    return Pipeline(bundle, warm_up=warm_up)


def _upload(
    engines: BucketEngines, table: SamplerTable, request: Request, chosen: list[int], generators: list[Generator]
) -> None:
    """Everything that the steps of one run read: after this the loop only launches."""
    shape = engines.latent_shape
    if request.latents is None:
        start = np.concatenate([g.randn((1, *shape[1:])) for g in generators])
    elif request.latents.shape != (len(request.prompts), *shape[1:]):
        raise RequestError(
            "the latents have another shape than the bucket",
            expected=(len(request.prompts), *shape[1:]),
            got=request.latents.shape,
        )
    else:
        start = request.latents[chosen]
    engines.states[0][...] = 0
    engines.states[0][0] = start * np.float32(table.init_noise_sigma)
    engines.counters[0][...] = 0
    engines.inputs["timesteps"][: table.evaluations] = table.timesteps
    engines.inputs["table"][: table.evaluations] = table.rows
    engines.inputs["guidance"][...] = request.guidance
    engines.inputs["noise"][...] = 0


def _draw(noise: NDArray[np.generic], generators: list[Generator]) -> None:
    for row, generator in enumerate(generators):
        noise[row : row + 1] = generator.randn((1, *noise.shape[1:]))


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    return image if (image.height, image.width) == size else image.crop((left, top, left + size[1], top + size[0]))
