"""A first recipe for a model on this machine, from the nearest shipped one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toolchain.builder.plan import check_recipe
from toolchain.engines.backend import Builder
from toolchain.engines.builders import builder_of, usable_dtypes
from toolchain.models.component import Family
from toolchain.models.registry import family_for, family_of
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, ComponentRecipe, Recipe, load_recipe, parse_recipe, shipped
from toolchain.recipe.toml import toml

SAMPLE_SIZE = 128
"""Latents along a side where a network's config names none: what diffusers' pipelines take then."""


@dataclass(frozen=True)
class Starter:
    """A recipe's text; `like` is the shipped recipe that it comes from."""

    text: str
    recipe: Recipe
    like: str


@dataclass(frozen=True)
class WrittenRecipe:
    """A recipe that was written to a file; `like` is the name of the shipped one that it comes from."""

    path: Path
    recipe: Recipe
    like: str


def write_starter(source: ModelSource, backend: str, name: str) -> Starter:
    """A recipe called `name` for this model and backend, ready to build.

    It has one bucket, of the model's own size. Raises ModelError for a model that no family covers.
    """
    family, chosen = family_for(source), builder_of(backend)
    like = min(map(_load, shipped.names()), key=lambda recipe: _distance(recipe, family, chosen, source))
    about = (
        f"# {source.name} with {backend}, after the recipe {like.name} that comes with diffbuild.\n"
        "# buckets: batch x height x width in pixels; each is built and held on its own. Add those that you serve.\n"
    )
    text = f"{about}{toml(_data(like, family, chosen, source))}\n"
    recipe = parse_recipe(text, name, f"the recipe for {source.name}")
    check_recipe(recipe, family_of(source, recipe), chosen, source)
    return Starter(text, recipe, like.name)


def _data(like: Recipe, family: Family, backend: Builder[Any], source: ModelSource) -> dict[str, Any]:
    """`like` for another model and backend, without most of what is at its default."""
    lacking = [c.name for c in family.components if c.optional and not _has(source, c.folder)]
    dtypes = _dtypes(like, backend)
    components = {name: recipe for name, recipe in like.components.items() if name not in lacking}
    options, plain = like.options(backend.name), like.to_json()
    check = plain["check"]
    if any(recipe.dtype not in dtypes for recipe in components.values()):
        check = {key: check[key] for key in ("prompts", "seeds")}  # its limits are for the types that it had
    else:
        check["components"] = {name: limits for name, limits in check["components"].items() if name not in lacking}
    return {
        "family": family.name,
        "backend": backend.name,
        "buckets": [str(native_bucket(family, source))],
        "classifier_free_guidance": like.classifier_free_guidance,
        **({"without": lacking} if lacking else {}),
        "components": {name: _component(recipe, dtypes) for name, recipe in components.items()},
        backend.name: _changed(options, type(options)()),
        "sampling": {key: value for key, value in plain["sampling"].items() if value != []},
        "check": check,
    }


def native_bucket(family: Family, source: ModelSource) -> Bucket:
    """One picture at the model's default size."""
    settings = family.settings(source)
    size = source.config(family.component("denoiser").folder).get("sample_size") or SAMPLE_SIZE
    height, width = size if isinstance(size, list) else (size, size)
    sides = (side * settings.vae_factor // settings.multiple * settings.multiple for side in (height, width))
    return Bucket(1, *sides)


def _load(name: str) -> Recipe:
    return load_recipe(Path(name))


def _distance(recipe: Recipe, family: Family, backend: Builder[Any], source: ModelSource) -> tuple[bool | str, ...]:
    """Nothing is as far away as another family; then comes what changes the picture, then what changes its cost."""
    if recipe.family != family.name:
        return (True,)
    embedded = family.settings(source).embedded_guidance
    guided = recipe.classifier_free_guidance or embedded
    usable = _dtypes(recipe, backend)
    dtypes = {component.dtype for component in recipe.components.values()} or {"float32"}
    return (
        False,
        recipe.quantizes,  # whose limits and exceptions were found on another model
        guided != (recipe.sampling.guidance > 0),  # a model that was distilled to draw without guidance
        recipe.backend != backend.name,
        dtypes != {"float32"} if usable == ("float32",) else dtypes == {"float32"} or not dtypes <= {*usable},
        any(component.quantize is not None for component in recipe.components.values()),  # wants limits of its own
        recipe.backend == "openvino",  # whose sizes are for a CPU; where it is wanted all others are further away
        native_bucket(family, source) not in recipe.buckets,
        recipe.name,
    )


def _has(source: ModelSource, folder: str) -> bool:
    return source.index.get(folder) not in (None, [None, None])


def _dtypes(like: Recipe, backend: Builder[Any]) -> tuple[str, ...]:
    """What is worth computing in here: ONNX Runtime gains nothing on a CPU by less than float32."""
    return ("float32",) if backend.name == "onnxruntime" else usable_dtypes(backend, like.options(backend.name))


def _component(recipe: ComponentRecipe, dtypes: tuple[str, ...]) -> dict[str, Any]:
    """With another small type where its own is not to be had, which reaches as far as float32; or else with float32."""
    fitting = recipe
    if recipe.dtype not in dtypes:
        fitting = ComponentRecipe("bfloat16" if "bfloat16" in dtypes else "float32", tokens=recipe.tokens)
    return {"dtype": fitting.dtype, **_changed(fitting, ComponentRecipe())}


def _changed(options: Any, default: Any) -> dict[str, Any]:
    """What is not at its default."""
    pairs = ((name, value, getattr(default, name)) for name, value in vars(options).items())
    return {name: list(v) if isinstance(v, tuple) else v for name, v, usual in pairs if v != usual}
