"""Components (what is compiled) and families (the kinds of model that they make up), as data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from toolchain.recipe import Bucket, Recipe
from toolchain.settings import ModelSettings
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch import nn

    from toolchain.models.source import ModelSource


@dataclass(frozen=True, kw_only=True)
class Component:
    """One compiled part of a model.

    folder      subfolder of the diffusers model with its config.json and weights
    prefix      attribute path of the checkpoint's module inside the exported wrapper, with a trailing dot
    per_bucket  False where the graph is the same for every bucket (text encoders run one prompt at a time)
    spec        (source, bucket, recipe) -> signature
    module      (source, recipe) -> the wrapper to export, built from the config alone
    reference   (source, recipe) -> the same wrapper with the checkpoint's weights in float32
    tokenizer   of a text encoder: the folder of its tokenizer. Its outputs [1, ...] are named as the inputs [B, ...] of
                the denoiser that they become, the negative prompts' first
    optional    whether a recipe may leave the component out (`without`)
    modules     the outermost modules of the checkpoint's network that it uses, where these are not all

    Of the recipe, spec, module and reference read `components`, `classifier_free_guidance` and `without` alone: a
    graph's key holds its signature, its own component's table and whether it is guided.
    """

    name: str
    folder: str
    prefix: str
    per_bucket: bool
    spec: Callable[[ModelSource, Bucket, Recipe], GraphSpec]
    module: Callable[[ModelSource, Recipe], nn.Module]
    reference: Callable[[ModelSource, Recipe], nn.Module]
    tokenizer: str | None = None
    optional: bool = False
    modules: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Family:
    """A kind of model: its components, in the order in which a picture passes through them.

    pipeline   the diffusers pipeline class that this family reproduces
    others     diffusers' other pipeline classes over the same networks, whose names a saved model may carry
    check      (source, recipe) -> ModelError for a model that this family does not cover, RecipeError for a recipe that
               does not fit the model, before any long work
    settings   (source) -> the settings of the model that the runtime needs
    checker    the safety checker, compiled only where the recipe asks for it
    inversion  whether the pipeline expands the first token of a textual inversion to all of its vectors
    """

    name: str
    pipeline: str
    others: tuple[str, ...]
    components: tuple[Component, ...]
    check: Callable[[ModelSource, Recipe], None]
    settings: Callable[[ModelSource], ModelSettings]
    checker: Component | None = None
    inversion: bool = True

    @property
    def _all(self) -> tuple[Component, ...]:
        return self.components if self.checker is None else (*self.components, self.checker)

    def component(self, name: str) -> Component:
        """The component of that name, the safety checker included; it must exist."""
        return next(c for c in self._all if c.name == name)

    def parts(self, recipe: Recipe) -> tuple[Component, ...]:
        """The components that a recipe compiles, in order."""
        compiled = self._all if recipe.safety.checker else self.components
        return tuple(c for c in compiled if c.name not in recipe.without)
