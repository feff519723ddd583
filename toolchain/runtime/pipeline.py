"""Bundle -> pictures, without torch, diffusers, transformers or onnx."""

from __future__ import annotations

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.bundle.bundle import Bundle
from toolchain.bundle.signing import open_bundle
from toolchain.engines.backend import Engine, Runner
from toolchain.engines.buffers import Memory
from toolchain.errors import RequestError
from toolchain.recipe import Bucket
from toolchain.runtime import safety
from toolchain.runtime.engines import F32, BucketEngines, open_engine, open_memory, usable_backend
from toolchain.runtime.lock import FairLock
from toolchain.runtime.loop import denoise
from toolchain.runtime.noise import Generator
from toolchain.runtime.observer import NOBODY, Observer, check_observer, observed
from toolchain.runtime.progress import Callback, Look, Progress
from toolchain.runtime.request import Options, Picture, Request, Size, check_images, check_latents, takes
from toolchain.runtime.resolve import resolve
from toolchain.runtime.result import Result, Timings
from toolchain.runtime.start import draw, normal, place_next, upload
from toolchain.runtime.tables import Tables
from toolchain.runtime.text import Conditions, TextEncoders, place
from toolchain.sampler.layout import MAX_EVALUATIONS
from toolchain.sampler.table import SamplerTable

log = logging.getLogger("toolchain")


class Pipeline:
    """A loaded bundle.

    Threads may share it: one call uses its engines at a time, and the others wait in first-in, first-out order. To draw
    in parallel, load several pipelines, which share their mapped weights on a CPU. A callback or an observer may not
    use the pipeline that is calling it: RequestError.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        warm_up: bool = True,
        open_buckets: int | None = None,
        observer: Observer | None = None,
        backend: Runner[Any] | None = None,
    ) -> None:
        """Opens the text encoders and, with `warm_up`, every bucket that may be open, and runs each engine once.

        observer  as for `load`
        backend   opens the engines in place of the bundle's own

        Raises BundleError when the engines were built for another device or version, and RequestError.
        """
        if open_buckets is not None and open_buckets < 1:
            raise RequestError("too few buckets may be open", expected="1 or more, or None", got=open_buckets)
        self._open_buckets = open_buckets or len(bundle.buckets)
        self._lock = FairLock()
        self._closed = False
        self.bundle = bundle
        self._backend = usable_backend(bundle, backend)
        self._observer = check_observer(observer)
        self._buckets: OrderedDict[Bucket, BucketEngines] = OrderedDict()  # the one used longest ago first
        self._tables = Tables(bundle, self._observer)
        with ExitStack() as opened:
            self._memory = open_memory(bundle, self._backend, open_buckets)
            opened.callback(self._memory.close)
            self._texts = TextEncoders(bundle, self._backend, self._memory, self._observer)
            opened.callback(self._texts.close)
            self._safety = None
            if safety.COMPONENT in bundle.engines:
                self._safety = safety.SafetyChecker(bundle, self._backend, self._memory, self._observer)
                opened.callback(self._safety.close)
            opened.callback(self._close_buckets)
            if warm_up:
                self.warm_up()
            self._opened = opened.pop_all()

    @takes(Options)
    def __call__(self, options: Options) -> Result:
        """Pictures for one prompt or several.

        A seed draws what torch's CPU generator draws: the picture is that of diffusers with a generator for each one.
        Raises RequestError for anything the bundle cannot do.
        """
        started = time.perf_counter()
        request = resolve(self.bundle, options)
        asked = time.perf_counter()
        with self._turn():
            started += time.perf_counter() - asked  # other calls are no part of this one
            return self._draw(request, options.decode, options.callback, started)

    def decode(self, latents: F32) -> list[Image.Image]:
        """Pictures of latents [N, C, h, w] of a built size, such as `Result.latents`. RequestError for others."""
        shapes = {self._latent_shape(bucket): (bucket.height, bucket.width) for bucket in self.bundle.buckets}
        size = shapes.get(check_latents(latents).shape[1:])
        if size is None:
            expected = "N x " + " or ".join(str(shape) for shape in shapes)
            raise RequestError("the latents have another shape than the buckets", expected=expected, got=latents.shape)
        images: list[Image.Image] = []
        with self._turn():
            for engines, chosen, count in self._batches(len(latents), size):
                self._memory.write(engines.states[0][0], latents[chosen])
                engines.decoders[0]()
                images += [Image.fromarray(pixels) for pixels in self._memory.read(engines.pixels)[0][:count]]
        return images

    def encode(
        self,
        image: Picture | Sequence[Picture],
        *,
        size: Size | None = None,
        seed: int | Sequence[int] | None = None,
    ) -> F32:
        """Latents [N, C, h, w] of pictures, scaled as the denoiser and `decode` take them.

        size  a built one, that of the bucket which comes nearest where it is not given; pictures are resized to it
        seed  samples the posterior, as image to image does; None takes its mean

        RequestError, also for a bundle that was built without image to image.
        """
        count = len(image) if isinstance(image, list | tuple) else 1
        images, seeds = check_images(image, count), 0 if seed is None else seed
        asked = Options.of([""] * count, image=images, size=size, seed=seeds, strength=1.0)
        request = resolve(self.bundle, asked)
        assert request.images is not None
        parts: list[F32] = []
        with self._turn():
            for engines, chosen, filled in self._batches(count, request.run_size):
                generators = [Generator(request.seeds[i]) for i in chosen]
                noise = 0.0 if seed is None else normal(engines.latent_shape, generators)
                given = {"pixels": request.images[chosen], "noise": noise, "start_noise": 0, "signal": 1, "sigma": 0}
                assert engines.encoder is not None
                parts.append(self._memory.read(engines.encoder(given)["latents"])[0][:filled])
        return np.concatenate(parts)

    @property
    def memory(self) -> Memory:
        """Where the engines' buffers lie. An observer that wants a GPU's times makes marks in it, as `trace` does."""
        return self._memory

    @property
    def sizes(self) -> list[Size]:
        """(height, width) of what was built, in pixels; the first is the default."""
        return list(dict.fromkeys((bucket.height, bucket.width) for bucket in self.bundle.buckets))

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Pipeline of {self.bundle!r}{', closed' if self._closed else ''}>"

    def warm_up(self) -> None:
        """Opens every bucket, or the first that may be open at once, and runs each engine once."""
        with self._turn():
            self._texts(dict.fromkeys(self.bundle.tokenizers, ""), 0)
            for bucket in self.bundle.buckets[: self._open_buckets]:
                self._engines(bucket).warm_up()

    def forget_prompts(self) -> None:
        """Empties the cache of encoded prompts."""
        with self._turn():
            self._texts.forget()

    def close(self) -> None:
        """Frees every engine, after the calls that came before. Later calls raise RequestError."""
        with self._lock:
            self._closed = True
            self._opened.close()

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """The engines for this thread alone."""
        with self._lock:
            if self._closed:
                raise RequestError(
                    "the pipeline is closed", where=self.bundle.path, hint="toolchain.load opens it anew"
                )
            yield

    def _close_buckets(self) -> None:
        while self._buckets:
            self._buckets.popitem(last=False)[1].close()

    def _draw(self, request: Request, decode: bool, callback: Callback | None, started: float) -> Result:
        timings = Timings()
        tell = getattr(callback, "stage", log.info)
        asked = request.scheduler, request.steps, request.run_size, request.skip
        table, timings.table_ms = self._tables(*asked, tell)
        images: list[Image.Image] = []
        parts: list[F32] = []
        flagged: list[bool] = []
        for engines, chosen, count in self._batches(len(request.prompts), request.run_size):
            pixels, result = self._run(engines, request, table, chosen, decode, callback, timings)
            parts.append(result[:count])
            if self._safety is not None and decode:
                with self._observer.stage("safety"):
                    black = self._safety(pixels[:count])
                pixels[:count][black] = 0
                flagged += black
                timings.launches += count
            images += [_crop(Image.fromarray(p), request.size) for p in pixels[:count]]
        timings.total_ms = (time.perf_counter() - started) * 1e3
        safety.tell(flagged)
        checked = self._safety is not None and decode
        return Result(images, np.concatenate(parts), request, table, timings, flagged if checked else None)

    def _batches(self, count: int, size: Size) -> Iterator[tuple[BucketEngines, list[int], int]]:
        """Buckets that together hold `count` pictures: which picture lies in each place, and how many are different.

        A part-filled batch repeats its last picture.
        """
        first = 0
        for batch in bucket_batches(self.bundle, count, size):
            filled = min(batch, count - first)
            yield self._engines(Bucket(batch, *size)), [first + min(i, filled - 1) for i in range(batch)], filled
            first += filled

    def table(self, scheduler: str, steps: int, size: Size, skip: int = 0) -> SamplerTable:
        """The sampler table of a scheduler, from the bundle or compiled now.

        size  (height, width) of the bucket, which decides the schedule of some flow-matching models
        skip  steps that image to image leaves out
        """
        with self._turn():
            return self._tables(scheduler, steps, size, skip, log.info)[0]

    def _engines(self, bucket: Bucket) -> BucketEngines:
        if bucket not in self._buckets:
            while len(self._buckets) >= self._open_buckets:
                self._buckets.popitem(last=False)[1].close()

            def opened(name: str) -> Engine:
                return open_engine(self.bundle, self._backend, name, bucket, self._memory, self._observer)

            log.debug("opening the engines of %s", bucket)
            with_encoder = "vae_encoder" in self.bundle.engines
            self._buckets[bucket] = BucketEngines(self._memory, opened, with_encoder=with_encoder)
        self._buckets.move_to_end(bucket)
        return self._buckets[bucket]

    def _latent_shape(self, bucket: Bucket) -> tuple[int, ...]:
        return self.bundle.engine("vae_decoder", bucket).spec.input("latents").shape[1:]

    def _conditions(self, request: Request, chosen: list[int]) -> tuple[list[Conditions], list[Conditions]]:
        """(of the negative prompts, none without guidance; of the prompts)"""
        positives = [self._texts(request.texts[i], request.clip_skip) for i in chosen]
        if not self.bundle.recipe.classifier_free_guidance:
            return [], positives
        if request.negative_texts is None:
            return [self._texts.zeros() for _ in chosen], positives
        return [self._texts(request.negative_texts[i], 0) for i in chosen], positives  # clip skip is the prompt's alone

    def _run(
        self,
        engines: BucketEngines,
        request: Request,
        table: SamplerTable,
        chosen: list[int],
        decode: bool,
        callback: Callback | None,
        timings: Timings,
    ) -> tuple[NDArray[np.uint8], F32]:
        """One pass through a bucket for the pictures `chosen`: pixels [B, H, W, 3] and latents [B, C, h, w]."""
        memory, stage = self._memory, self._observer.stage
        before = self._texts.tokenize_ms, self._texts.launches
        marks = [memory.mark()]
        log.debug("text encoders: %d pictures", len(chosen))
        with stage("text"):
            place(memory, engines.inputs, *self._conditions(request, chosen))
        marks.append(memory.mark())
        with stage("upload"):
            generators = [Generator(request.seeds[i]) for i in chosen]
            upload(engines, table, request, chosen, generators)
        marks.append(memory.mark())
        log.debug("denoising: %d evaluations of %s", table.evaluations, request.scheduler)
        with stage("denoise"):
            done, evaluated = self._denoise(engines, table, generators, callback, timings)
        marks.append(evaluated[-1])
        latents = engines.states[done % 2][0]
        if decode:
            log.debug("decoding")
            with stage("decode"):
                engines.decoders[done % 2]()
        marks.append(memory.mark())
        arrays = memory.read(latents, *([engines.pixels] if decode else []))
        timings.tokenize_ms += self._texts.tokenize_ms - before[0]
        timings.launches += self._texts.launches - before[1] + done + decode + (request.images is not None)
        timings.add(memory, marks, evaluated)
        return (arrays[1] if decode else np.empty((0, *engines.pixels.shape[1:]), np.uint8)), arrays[0]

    def _denoise(
        self,
        engines: BucketEngines,
        table: SamplerTable,
        generators: list[Generator],
        callback: Callback | None,
        timings: Timings,
    ) -> tuple[int, list[Any]]:
        """Runs the loop; evaluations done, and a mark after each. What runs as one launch has one mark, at its end."""
        memory, marks = self._memory, []
        if engines.run is not None and callback is None and not table.stochastic:
            for first in range(0, table.evaluations, MAX_EVALUATIONS):
                if first:
                    place_next(engines, table, first)
                _timed(partial(engines.run, min(MAX_EVALUATIONS, table.evaluations - first)), timings)()
            return table.evaluations, [memory.mark()]
        steps = (_timed(engines.steps[0], timings), _timed(engines.steps[1], timings))
        evaluations = denoise(steps, table.noise_draws, lambda: draw(memory, engines.inputs["noise"], generators))
        if self._observer is not NOBODY:
            evaluations = observed(evaluations, table.timesteps.tolist(), self._observer)
        for index in evaluations:
            marks.append(memory.mark())
            if (index + 1) % MAX_EVALUATIONS == 0 and index + 1 < table.evaluations:
                place_next(engines, table, index + 1)
            if callback is not None:
                look = Look(partial(_first, memory, engines.states[(index + 1) % 2][0]))
                try:
                    if callback(Progress(index, table.evaluations, float(table.timesteps[index]), look)) is False:
                        break
                finally:
                    look.end()
        return len(marks), marks


def bucket_batches(bundle: Bundle, count: int, size: Size) -> list[int]:
    """Bucket batches that together hold `count` pictures: the largest that fit, then the smallest."""
    built = sorted({b.batch for b in bundle.buckets if (b.height, b.width) == size})
    batches = []
    while count > 0:
        batch = max((b for b in built if b <= count), default=built[0])
        batches.append(batch)
        count -= batch
    return batches


def _first(memory: Memory, buffer: Any) -> F32:
    return memory.read(buffer)[0]


def _timed(launch: Callable[[], None], timings: Timings) -> Callable[[], None]:
    def run() -> None:
        started = time.perf_counter()
        launch()
        timings.launch_ms += (time.perf_counter() - started) * 1e3

    return run


def load(
    path: str | Path,
    *,
    verify: bool = True,
    trust: str | Path | None = None,
    warm_up: bool = True,
    open_buckets: int | None = None,
    observer: Observer | None = None,
) -> Pipeline:
    """Opens a bundle.

    verify        compare every file with its sha256 first; leave it on unless the bundle was just verified
    trust         a public key that must have signed the bundle; $DIFFBUILD_TRUST where it is not given
    warm_up       open every bucket and run each engine once, so that the first request is as fast as the others
    open_buckets  how many may be open at once: where memory is short, the one used longest ago is closed when another
                  is asked for, and opened anew when its turn comes again; None: all of them
    observer      sees the stages, evaluations and engine calls of everything that the pipeline does

    Raises BundleError for a bundle that is damaged, of a newer format, not signed by the trusted key, or built for
    another device or version.
    """
    bundle = open_bundle(Path(path), verify=verify, trust=trust)
    return Pipeline(bundle, warm_up=warm_up, open_buckets=open_buckets, observer=observer)


def _crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    top, left = (image.height - size[0]) // 2, (image.width - size[1]) // 2
    return image if (image.height, image.width) == size else image.crop((left, top, left + size[1], top + size[0]))
