"""`diffbuild bench`: where the time of a picture goes, and how long others take for the same picture.

Every contender is a process of its own that stays open: they draw in turn, round after round, so that the machine's
drift hits all alike, and each has its own peak memory. The first picture of a process is its cold start, and is not
among the rounds.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.bench.contender import Contender
from toolchain.bench.rebuilt import OPENVINO, rebuilt
from toolchain.bench.results import BenchReport, summarize
from toolchain.bench.workload import Workload, workload
from toolchain.builder.open_model import open_model
from toolchain.bundle.bundle import Bundle, read_bundle
from toolchain.bundle.forecast import forecast
from toolchain.bundle.signing import require_trusted
from toolchain.check.report import Pair
from toolchain.engines.machine import installed, machine
from toolchain.errors import UsageError
from toolchain.recipe import Bucket
from toolchain.runtime.engines import usable_backend
from toolchain.runtime.pipeline import bucket_batches

if TYPE_CHECKING:
    from toolchain.check.report import Pixels

OURS = "diffbuild"
AGAINST = {
    "diffusers": ("torch", "diffusers"),
    "compile": ("torch", "diffusers"),
    OPENVINO: ("openvino", "torch", "diffusers", "onnx_ir"),
}
"""Other contenders, and what they import: the diffusers pipeline in eager mode, the same with torch.compile, and a
bundle of the same recipe with OpenVINO."""
SWEEP_STEPS = (5, 10, 20, 40)
VERSIONS = ("diffbuild", "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "diffusers", "transformers")


def measure(
    path: Path,
    progress: Callable[[str], None] = lambda text: None,
    *,
    model: str | None = None,
    revision: str | None = None,
    config: str | None = None,
    store: str | Path | None = None,
    against: tuple[str, ...] = (),
    repeats: int = 5,
    prompt: str | None = None,
    steps: int | None = None,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    sweep: tuple[str, ...] = (),
) -> BenchReport:
    """`diffbuild bench`, by the names of its options. Raises what `bench` and `open_model` raise."""
    bundle = read_bundle(path)
    require_trusted(bundle)
    work = workload(bundle, prompt, batch, size, steps)
    folder = open_model(model, revision, config=config, store=store).path if model is not None and against else None
    return bench(
        bundle, work, against=against, model=folder, store=store, repeats=repeats, sweeps=sweep, progress=progress
    )


def bench(
    bundle: Bundle,
    work: Workload,
    *,
    against: tuple[str, ...] = (),
    model: Path | None = None,
    store: str | Path | None = None,
    repeats: int = 5,
    sweeps: tuple[str, ...] = (),
    progress: Callable[[str], None] = lambda text: None,
) -> BenchReport:
    """Measures a bundle, and the other contenders that it is compared with.

    model  the diffusers folder that the bundle was built from, for the other contenders
    store  where the bundle was built, for its graphs, and where OpenVINO's engines are; None: the default store

    Raises UsageError for a contender that is not installed or has no model, BundleError for a bundle that cannot run
    here, DiffbuildError with a contender's output when it fails.
    """
    _refuse(bundle, against, model)
    with tempfile.TemporaryDirectory(prefix="diffbuild-bench-") as scratch:
        contenders, bundles = [], {OURS: bundle}
        if OPENVINO in against and model is not None:
            bundles[OPENVINO] = rebuilt(bundle, model, Path(scratch) / OPENVINO, progress, store)
        try:
            for name in (OURS, *against):
                progress(f"starting {name}")
                contenders.append(Contender(name, bundles.get(name, bundle).path, model, work, Path(scratch)))
            rounds: list[dict[str, Any]] = []
            for number in range(repeats):
                progress(f"round {number + 1} of {repeats}")
                rounds.append({c.name: c.draw(work) for c in contenders})
            ends = {c.name: c.finish() for c in contenders}  # before the sweeps, which take memory of their own
            swept = {kind: _sweep(contenders[0], bundle, work, kind, progress) for kind in sweeps}
        finally:
            for contender in contenders:
                contender.close()
        pictures = {c.name: _pixels(c.picture) for c in contenders}
    return BenchReport(
        bundle=str(bundle.path),
        recipe=bundle.recipe.name,
        workload=vars(work) | {"size": f"{work.size[0]}x{work.size[1]}"},
        repeats=repeats,
        machine=machine(),
        versions=installed(VERSIONS),
        contenders={c.name: summarize(c.start, [r[c.name] for r in rounds], ends[c.name]) for c in contenders},
        ratios={n: [r[n]["total_ms"] / r[OURS]["total_ms"] for r in rounds] for n in against},
        likeness_db={name: _psnr_db(pictures[OURS], pictures[name]) for name in against},
        sweeps=swept,
        precisions={name: each.recipe.precisions for name, each in bundles.items()},
        forecast_mb=_forecast_mb(bundle, work),
        pictures=pictures,
    )


def _refuse(bundle: Bundle, against: tuple[str, ...], model: Path | None) -> None:
    usable_backend(bundle)
    for name in against:
        if name == bundle.backend:
            raise UsageError(
                f"the bundle's own backend is {name}, which it cannot be measured against",
                where=bundle.path,
                expected=f"--against {' or '.join(other for other in AGAINST if other != name)}",
                got=name,
            )
        missing = [package for package in AGAINST[name] if find_spec(package) is None]
        if missing:
            hint = f"pip install 'diffbuild[{OPENVINO if OPENVINO in missing else 'build'}]'"
            raise UsageError(
                f"{name} cannot be measured", expected=" and ".join(missing), got="not installed", hint=hint
            )
        if model is None:
            raise UsageError(
                f"{name} needs the model that the bundle was built from",
                expected="--model",
                got="none",
                hint=f"diffbuild bench {bundle.path} --model {bundle.model['name']} --against {name}",
            )


def _sweep(
    ours: Contender, bundle: Bundle, work: Workload, kind: str, progress: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Median milliseconds of three pictures at each point."""
    points: dict[str, Workload] = {}
    if kind == "steps":
        points = {str(steps): replace(work, steps=steps) for steps in SWEEP_STEPS}
    elif kind == "batch":
        built = sorted({b.batch for b in bundle.buckets if (b.height, b.width) == work.size})
        points = {str(batch): replace(work, batch=batch) for batch in built}
    else:
        for height, width in sorted({(b.height, b.width) for b in bundle.buckets}, key=lambda s: s[0] * s[1]):
            points[f"{height}x{width}"] = replace(work, size=(height, width), batch=1)
    measured = []
    for label, point in points.items():
        progress(f"sweep of {kind}: {label}")
        ours.draw(point)
        times = sorted(ours.draw(point)["total_ms"] for _ in range(3))
        measured.append({kind: label, "total_ms": times[1], "images": point.batch})
    return measured


def _forecast_mb(bundle: Bundle, work: Workload) -> float | None:
    """Of a process that has warmed up every engine, or on a GPU opened no other, and draws those of the workload."""
    memory = forecast(bundle)
    drawn = {Bucket(batch, *work.size) for batch in bucket_batches(bundle, work.batch, work.size)}
    names = {f"{part} {bucket}" for part in ("denoiser", "vae_decoder") for bucket in drawn}
    names |= {f"vae_encoder {bucket}" for bucket in drawn} if memory.on_gpu else set()
    total = memory.after({*bundle.tokenizers, *names})
    return None if total is None else total / 1e6


def _pixels(path: Path) -> Pixels:
    import numpy as np
    from PIL import Image

    with Image.open(path) as image:
        return np.asarray(image.convert("RGB"))


def _psnr_db(ours: Pixels, theirs: Pixels) -> float | None:
    """How alike the first pictures are: contenders that draw other pictures do other work."""
    return Pair(theirs, ours).psnr_db if theirs.shape == ours.shape else None
