"""Pictures of real bundles: built through the ordinary builder, drawn by the runtime, compared with the reference's."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from toolchain.builder.assemble import assemble
from toolchain.builder.plan import Plan, make_plan
from toolchain.bundle.bundle import Bundle
from toolchain.check.measure import Feed
from toolchain.check.pictures import similarity
from toolchain.check.report import Pair
from toolchain.engines.runners import runner_of
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe
from toolchain.runtime.engines import BoundEngine, open_engine, open_memory
from toolchain.runtime.pipeline import Pipeline
from toolchain.store.artifacts import Artifact, Json
from toolchain.tune.budget import summarise
from toolchain.tune.kept import RESULT, Kept

Pixels = NDArray[np.uint8]
DRAWN = "pictures.npz"
SHOWN = 4
"""Pictures of each candidate that are kept for the page; of the reference all are."""
EQUAL_DB = 99.0
"""Stands for the infinite PSNR of equal pictures in an average."""


Steps = Callable[[], Sequence[Feed]]


@dataclass(frozen=True)
class Request:
    """What is drawn: every prompt with every seed, which is counted up over the prompts as a calibration's."""

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """In the order in which they are drawn."""
        return [(p, (seed + i) % 2**64) for i, p in enumerate(self.prompts) for seed in self.seeds]


@dataclass(frozen=True)
class Measured:
    """A candidate's pictures against the reference's.

    psnr_db, ssim  of each picture
    cosine         the least of the denoiser's step on recorded inputs; None where it was not asked for
    step_ms        median time of an evaluation while drawing
    drawn          file of the first pictures
    """

    psnr_db: tuple[float, ...]
    ssim: tuple[float, ...]
    cosine: float | None
    step_ms: float
    drawn: Path

    @property
    def pixels(self) -> Pixels:
        """The first SHOWN pictures."""
        return load_pixels(self.drawn)

    @property
    def summary(self) -> dict[str, float]:
        """The metrics of budgets."""
        return summarise(self.psnr_db, self.ssim, self.cosine)

    @property
    def error(self) -> float:
        """Mean squared error of levels of 255 that stands for all pictures: the one of their average PSNR."""
        return float(255**2 * 10 ** (-statistics.mean(min(value, EQUAL_DB) for value in self.psnr_db) / 10))


class Drawings:
    """Draws the same request with bundles of several recipes of one model.

    reference  the recipe that the others are compared with
    steps      gives inputs of the denoiser with the reference's outputs; None where its step is not compared
    """

    def __init__(self, reference: Recipe, source: ModelSource, kept: Kept, progress: Callable[[str], None]) -> None:
        self.reference, self.source, self.kept, self.progress = reference, source, kept, progress
        self.steps: Steps | None = None

    @cached_property
    def _reference_keys(self) -> list[Json]:
        return _keys(self.plan(self.reference))

    def plan(self, recipe: Recipe) -> Plan:
        """The build of a recipe."""
        return make_plan(recipe, self.source, self.kept.store, gate=False)

    def bundle(self, recipe: Recipe, folder: Path) -> Bundle:
        """Builds what the store does not hold yet. Raises the errors of every stage."""
        return build_ungated(self.plan(recipe), folder)

    def measure(self, recipe: Recipe, request: Request, label: str) -> Measured:
        """A recipe's pictures against those of the reference, measured once. Raises the errors of every stage."""
        references = self.reference_pixels(request)
        inputs = {
            "reference": _keys(self.plan(self.reference)),
            **self._inputs(recipe, request),
            "cosine": self.steps is not None,
        }

        def compare(folder: Path) -> dict[str, Any]:
            self.progress(f"{label}: building")
            with tempfile.TemporaryDirectory(prefix="diffbuild-") as scratch:
                bundle = self.bundle(recipe, Path(scratch) / recipe.name)
                pixels, step_ms = self._draw(bundle, request, label)
                cosine = None if self.steps is None else _cosine(bundle, self.steps())
            np.savez_compressed(folder / DRAWN, pixels=pixels[:SHOWN])
            pairs = list(zip(references, pixels, strict=True))
            psnr = [Pair(*pair).psnr_db for pair in pairs]
            return {"psnr_db": psnr, "ssim": [similarity(*p) for p in pairs], "cosine": cosine, "step_ms": step_ms}

        artifact = self.kept.artifact("pictures", inputs, compare)
        data = json.loads(artifact.file(RESULT).read_text())
        cosine = None if data["cosine"] is None else float(data["cosine"])
        psnr, ssim = (tuple(map(float, data[name])) for name in ("psnr_db", "ssim"))
        return Measured(psnr, ssim, cosine, data["step_ms"], artifact.file(DRAWN))

    def reference_pixels(self, request: Request) -> Pixels:
        """All pictures [N, H, W, 3] of the reference, drawn once."""
        return load_pixels(self._reference_pictures(request).file(DRAWN))

    def reference_step_ms(self, request: Request) -> float:
        """The median time of an evaluation while the reference drew them."""
        return float(json.loads(self._reference_pictures(request).file(RESULT).read_text())["step_ms"])

    def _reference_pictures(self, request: Request) -> Artifact:

        def draw(folder: Path) -> dict[str, Any]:
            self.progress("reference: building")
            with tempfile.TemporaryDirectory(prefix="diffbuild-") as scratch:
                bundle = self.bundle(self.reference, Path(scratch) / self.reference.name)
                pixels, step_ms = self._draw(bundle, request, "reference")
            np.savez_compressed(folder / DRAWN, pixels=pixels)
            return {"step_ms": step_ms}

        return self.kept.artifact("reference pictures", self._inputs(self.reference, request), draw)

    def _inputs(self, recipe: Recipe, request: Request) -> dict[str, Json]:
        sampling = recipe.sampling
        return {
            "engines": _keys(self.plan(recipe)),
            "prompts": [*request.prompts],
            "seeds": [*request.seeds],
            "sampling": [sampling.scheduler, sampling.steps, sampling.guidance],
        }

    def _draw(self, bundle: Bundle, request: Request, label: str) -> tuple[Pixels, float]:
        """Pictures [N, H, W, 3], and the median time of an evaluation in milliseconds."""
        pixels: list[Pixels] = []
        step_ms: list[float] = []
        pairs, bucket = request.pairs, bundle.buckets[0]
        with closing(Pipeline(bundle, warm_up=False, open_buckets=1)) as pipeline:
            for first in range(0, len(pairs), bucket.batch):
                self.progress(f"{label}: picture {first + 1} of {len(pairs)}")
                part = pairs[first : first + bucket.batch]
                size = (bucket.height, bucket.width)
                result = pipeline([prompt for prompt, _ in part], seed=[seed for _, seed in part], size=size)
                pixels += [np.asarray(image) for image in result.images]
                step_ms += result.timings.steps_ms
        return np.stack(pixels), statistics.median(step_ms)


def build_ungated(plan: Plan, folder: Path) -> Bundle:
    """The bundle of a plan without a gate, which is what is being searched for. Raises the errors of every stage."""

    def never(*_: Any) -> dict[str, Any]:
        raise AssertionError("the plan has no gate")

    return assemble(plan, folder, never)


def _keys(plan: Plan) -> list[Json]:
    """Of everything that decides a picture: engines, weights, tokenizers and sampler tables."""
    return [*sorted(step.key for step in plan.steps if step.stage not in ("graph", "merged"))]


def load_pixels(path: Path) -> Pixels:
    """Pictures [N, H, W, 3] from a file of theirs."""
    with np.load(path) as arrays:
        pixels: Pixels = arrays["pixels"]
    return pixels


def _cosine(bundle: Bundle, feeds: Sequence[Feed]) -> float:
    """The least cosine similarity of the denoiser's next state with the reference's."""
    runner = runner_of(bundle.backend)
    memory = open_memory(bundle, runner, 1)
    engine = BoundEngine(open_engine(bundle, runner, "denoiser", bundle.buckets[0], memory), memory)
    least = 1.0
    try:
        for feed in feeds:
            (state,) = memory.read(engine(feed.inputs)["next_state"])
            assert feed.reference is not None
            ours, theirs = (x.astype(np.float64).ravel() for x in (state, feed.reference["next_state"]))
            least = min(least, float(ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs)))
    finally:
        engine.close()
        memory.close()
    return least
