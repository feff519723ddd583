"""float16 that overflows: which modules leave its range on real inputs, how far they go, and what keeps them whole.

The reference, in float32, is watched on its own trajectories; then the component is computed in the recipe's types, as
`check.rounding` does, for values that no module gives.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from toolchain.check.measure import Feed, call
from toolchain.check.rounding import RoundedComponent, Watch
from toolchain.models.component import Component
from toolchain.recipe import Recipe
from toolchain.tune.references import References
from toolchain.tune.result import Overflow

NARROW = "float16"
"""The type whose range values leave; that of bfloat16 is float32's."""


def narrow_components(recipe: Recipe) -> list[str]:
    """The components of a recipe that can overflow."""
    return [name for name, part in recipe.components.items() if part.dtype == NARROW]


def keep_whole(
    recipe: Recipe, references: References, wide: str, progress: Callable[[str], None]
) -> tuple[Recipe, list[Overflow]]:
    """The recipe in which every value of its float16 components is finite, and what it keeps for that.

    wide  the type of a whole component, where no module in it can be kept alone
    """
    overflows = []
    for component in references.family.parts(recipe):
        if component.name in narrow_components(recipe):
            recipe, found = _keep_component(recipe, references, component, wide, progress)
            overflows += found
    return recipe, overflows


def _keep_component(
    recipe: Recipe, references: References, component: Component, wide: str, progress: Callable[[str], None]
) -> tuple[Recipe, list[Overflow]]:
    name = component.name
    module, spec, feeds = references.reference(name)
    progress(f"{name}: values beyond the range of {NARROW}")
    with Watch(module.get_submodule(component.prefix.rstrip(".")), float(torch.finfo(torch.float16).max)) as watch:
        for feed in feeds:
            call(module, spec, feed.inputs)
    modules, overflows = watch.modules(), list[Overflow]()
    whole, more = modules == [], _unkept(recipe, name, modules or ())
    while not whole:
        for inner in more:
            largest = watch.reached(inner)
            beyond = largest if largest > watch.limit else None
            overflows.append(Overflow(name, inner, beyond, f'keep_float32 = ["{inner}"]'))
        recipe = _changed(recipe, name, keep_float32=(*recipe.component(name).keep_float32, *more))
        progress(f"{name}: every value in {NARROW}")
        found = _not_finite(RoundedComponent(component, references.source, recipe, module), spec, feeds)
        more = _unkept(recipe, name, found)
        if not found:
            return recipe, overflows
        whole = not more or "" in more
    overflow = Overflow(name, "", watch.reached(""), f'dtype = "{wide}"')
    return _changed(recipe, name, dtype=wide, keep_float32=()), [overflow]


def _not_finite(rounded: RoundedComponent, spec: Any, feeds: Sequence[Feed]) -> list[str]:
    """The modules in which values become infinite; "" where there is none, and nothing where all are finite."""
    wrong = [feed for feed in feeds if not rounded.is_finite(spec, feed.inputs)]
    names = [name for feed in wrong for name in rounded.first_not_finite(spec, feed.inputs)]
    return list(dict.fromkeys(names)) or [""] * bool(wrong)


def _unkept(recipe: Recipe, component: str, modules: Sequence[str]) -> list[str]:
    """Those that no pattern of the recipe keeps, nor a module around them."""
    patterns = recipe.component(component).keep_float32

    def kept(module: str) -> bool:
        parts = module.split(".")
        around = [".".join(parts[: i + 1]) for i in range(len(parts))]
        return any(fnmatch.fnmatchcase(name, pattern) for name in around for pattern in patterns)

    return [module for module in modules if not module or not kept(module)]


def _changed(recipe: Recipe, name: str, **changes: Any) -> Recipe:
    return replace(recipe, components={**recipe.components, name: replace(recipe.component(name), **changes)})
