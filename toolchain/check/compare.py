"""`diffbuild check`: the compiled model against the model, component by component and in whole pictures.

The results are a `report`, where a gate that fails is a result. Errors are only for what cannot be compared.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from toolchain.bundle.bundle import Bundle
from toolchain.bundle.signing import admit
from toolchain.check.clip import require_clip, score_pictures
from toolchain.check.report import CheckReport, Entry, Metrics, Picture
from toolchain.engines.builders import builder_of
from toolchain.errors import DiffbuildError, ModelError
from toolchain.models.component import Family
from toolchain.models.registry import family_of
from toolchain.models.source import ModelSource
from toolchain.runtime.pipeline import Pipeline
from toolchain.store.files import file_digest

__all__ = ["CheckReport", "Entry", "Metrics", "Picture", "compare"]

PACKAGES = {
    "diffusers": "diffusers",
    "polygraphy": "polygraphy",
    "skimage": "scikit-image",
    "torch": "torch",
    "transformers": "transformers",
}
"""What a comparison imports, and the name under which it is installed."""


def compare(
    bundle: Bundle,
    source: ModelSource,
    *,
    clip: Path | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> CheckReport:
    """Compares a bundle with the model that it was built from; `progress` is called with a line for each part.

    clip  a folder with a CLIP model, to score the pictures with

    Takes the memory of one component in float32 at a time, then of the whole diffusers pipeline. Raises DiffbuildError
    where something is not installed, BundleError for a bundle that is damaged or made for another device, ModelError
    and WeightsError for a model that cannot be the bundle's or cannot be loaded, EngineError for an engine that fails.
    """
    require_packages()
    if clip is not None:
        require_clip(clip)
    from toolchain.check.components import compare_components
    from toolchain.check.pictures import compare_pictures, draw
    from toolchain.check.tables import compare_tables

    if not bundle.vouched:
        progress("verifying the bundle")
        bundle = admit(bundle)
    family = family_of(source, bundle.recipe)
    _refuse_other_shapes(bundle, source, family)
    warnings = _differences(bundle, source, family)
    sampling = bundle.recipe.sampling
    pipeline = Pipeline(bundle, warm_up=False, open_buckets=1)
    try:
        progress("sampler tables")
        entries = compare_tables(bundle, family.settings(source).scheduler)
        tables = {b: pipeline.table(sampling.scheduler, sampling.steps, (b.height, b.width)) for b in bundle.buckets}
        entries += compare_components(bundle, source, family, tables, progress)
        drawn = draw(pipeline, progress)
    finally:
        pipeline.close()
    pictures, changes = compare_pictures(bundle, source, family, drawn, progress)
    if clip is not None:
        pictures = score_pictures(clip, pictures, progress)
    return CheckReport(
        bundle=str(bundle.path),
        recipe=bundle.recipe.name,
        model=source.name,
        revision=source.revision,
        backend=bundle.backend,
        device=builder_of(bundle.backend).device(),
        versions={name: version(name) for name in sorted(["diffbuild", "numpy", *PACKAGES.values()])},
        warnings=tuple(warnings),
        entries=tuple(entries),
        pictures=tuple(pictures),
        limits=bundle.recipe.picture_limits,
        changes=tuple(changes),
    )


def require_packages() -> None:
    """DiffbuildError where something is not installed that a comparison imports."""
    for module in PACKAGES:
        try:
            import_module(module)
        except ImportError as error:
            raise DiffbuildError(
                "a check needs what bundles are built with", got=str(error), hint="pip install 'diffbuild[build]'"
            ) from error


def _refuse_other_shapes(bundle: Bundle, source: ModelSource, family: Family) -> None:
    """ModelError where the model's tensors have other shapes than the engines': nothing could be fed to both."""
    for component in family.parts(bundle.recipe):
        for bucket in bundle.buckets:
            expected = bundle.engine(component.name, bucket).spec
            got = component.spec(source, bucket, bundle.recipe)
            if got != expected:
                pairs = zip(expected.inputs + expected.outputs, got.inputs + got.outputs, strict=False)
                first = next(((e, g) for e, g in pairs if e != g), (expected, got))
                raise ModelError(
                    f"the model's {component.name} has other shapes than the bundle's",
                    where=source.path / component.folder,
                    expected=first[0],
                    got=first[1],
                    hint=f"give the model that the bundle was built from: {bundle.model['name']}",
                )


def _differences(bundle: Bundle, source: ModelSource, family: Family) -> list[str]:
    """A line for each difference between the model and what the bundle was built from. WeightsError where weights are
    missing."""
    from toolchain.weights.safetensors import find_weights

    lines = []
    for component in family.parts(bundle.recipe):
        built_from = bundle.model.get("checkpoint", {}).get(component.name)
        digests = {path.name: file_digest(path) for path in find_weights(source.path / component.folder)}
        if digests != built_from:
            lines.append(f"the {component.name}'s weights are not those that the bundle was built from")
    if bundle.settings.scheduler != family.settings(source).scheduler:
        lines.append("the scheduler's config is not the one that the bundle was built from")
    return lines
