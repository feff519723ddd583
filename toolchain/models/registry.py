"""The families that are supported, and which of them a model and a recipe belong to."""

from __future__ import annotations

import difflib
import logging
from functools import cache

from toolchain.errors import ModelError
from toolchain.models.component import Family
from toolchain.models.flux import FLUX
from toolchain.models.sd import SD
from toolchain.models.sd3 import SD3
from toolchain.models.sdxl import SDXL
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe

log = logging.getLogger("toolchain")

MODELS: dict[str, Family] = {"sd": SD, "sdxl": SDXL, "sd3": SD3, "flux": FLUX}


def family_for(source: ModelSource) -> Family:
    """The family of a model. ModelError where none covers its pipeline."""
    supported = {name: family for family in MODELS.values() for name in (family.pipeline, *family.others)}
    pipeline = str(source.index["_class_name"])
    if pipeline not in supported:
        close = difflib.get_close_matches(pipeline, supported, n=1)
        raise ModelError(
            f"{pipeline} is not supported",
            where=source.path / "model_index.json",
            expected="one of " + ", ".join(sorted(family.pipeline for family in MODELS.values())),
            got=pipeline,
            hint=f"the nearest supported class is {close[0]}" if close else None,
        )
    return supported[pipeline]


def named_family(name: str) -> Family:
    """The family that a recipe names. ModelError where there is none of that name."""
    if name not in MODELS:
        raise ModelError("the recipe names an unknown family", expected=" or ".join(sorted(MODELS)), got=name)
    return MODELS[name]


def family_of(source: ModelSource, recipe: Recipe) -> Family:
    """The family that a recipe names, after checking that the model is of it. Raises ModelError and RecipeError."""
    detected, family = family_for(source), named_family(recipe.family)
    pipeline = str(source.index["_class_name"])
    if detected is not family:
        raise ModelError(
            "the recipe is for another family than the model",
            where=source.path / "model_index.json",
            expected=f"a model of family {family.name} ({family.pipeline})",
            got=f"{pipeline}, family {detected.name}",
            hint=f"use a recipe with family = {detected.name!r}",
        )
    family.check(source, recipe)
    if pipeline != family.pipeline:
        _say_that_it_is_ordinary(source.name, pipeline, family.pipeline)
    return family


@cache
def _say_that_it_is_ordinary(model: str, pipeline: str, base: str) -> None:
    """Logs once per model that a variant of the pipeline is compiled as the ordinary one."""
    log.warning("%s was saved by %s over ordinary networks: it is compiled as a %s", model, pipeline, base)
