"""Whether the patterns of `keep_float32` and `quantize.exclude` match modules: told by planning, before any export.

The names in a diffusers checkpoint are those of its modules, which answers most patterns without torch. What is left,
such as the name of a module without weights, is looked for in the network itself, made without memory.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable
from dataclasses import replace

from toolchain.errors import WeightsError
from toolchain.models.component import Component
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe
from toolchain.weights.safetensors import read_folder

OLDER = ("query", "proj_attn")
"""Modules in checkpoints that call to_q and to_out so: names in a recipe are today's."""


def pattern_problems(component: Component, source: ModelSource, recipe: Recipe, *, exported: bool) -> list[str]:
    """A line for each pattern of a component that matches no module.

    exported: its graph is in the store, so that `keep_float32` of a narrower type matches: construction checks that.
    """
    precision = recipe.component(component.name)
    known = _own(component, _names_of_weights(component, source))
    kept = () if exported and precision.dtype != "float32" else precision.keep_float32
    left = {
        "keep_float32": _unmatched(kept, known),
        "quantize.exclude": _unmatched(precision.quantize.exclude if precision.quantize else (), known),
    }
    if not any(left.values()):
        return []
    names = _own(component, _names_of_modules(component, source, recipe))
    return [
        f"components.{component.name}.{key}: no module matches {pattern!r}{_hint(pattern, names)}"
        for key, patterns in left.items()
        for pattern in _unmatched(patterns, names)
    ]


def _own(component: Component, names: Iterable[str]) -> list[str]:
    """Those of the modules that it uses: one half of a VAE, not the other."""
    return [name for name in names if not component.modules or name.split(".")[0] in component.modules]


def _unmatched(patterns: Iterable[str], names: Collection[str]) -> list[str]:
    return [p for p in patterns if not any(fnmatch.fnmatchcase(name, p) for name in names)]


def _hint(pattern: str, names: list[str]) -> str:
    close = difflib.get_close_matches(pattern, names, n=1)
    top = ", ".join(name for name in names if "." not in name)
    return (f", did you mean {close[0]!r}?" if close else "") + f" (expected names or patterns of modules, in {top})"


def _names_of_weights(component: Component, source: ModelSource) -> set[str]:
    """Of the modules that have weights and those around them. What transformers calls them differs by its release."""
    library = source.index.get(component.folder, [None])[0]
    if library != "diffusers" or not source.has_weights(component.folder):
        return set()
    try:
        keys = read_folder(source.path / component.folder).keys()
    except WeightsError:
        return set()  # told where the weights are needed
    parts = [key.split(".")[:-1] for key in keys]
    if any(name in OLDER for names in parts for name in names):
        return set()
    return {".".join(names[: i + 1]) for names in parts for i in range(len(names))}


def _names_of_modules(component: Component, source: ModelSource, recipe: Recipe) -> list[str]:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from toolchain.export.capture import make_module

    plain = replace(recipe.component(component.name), keep_float32=())
    recipe = replace(recipe, components={**recipe.components, component.name: plain})
    with FakeTensorMode(allow_non_fake_inputs=True):
        module = make_module(component, source, recipe)
    return [name for name, _ in module.get_submodule(component.prefix.removesuffix(".")).named_modules() if name]
