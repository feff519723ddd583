"""What is compiled, as data: components with their inputs and outputs, and the family that they make up."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.recipe import Bucket, ComponentRecipe
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch import nn

    from toolchain.models.source import ModelSource


@dataclass(frozen=True)
class Component:
    """One compiled part of a model.

    folder      subfolder of the diffusers model that holds its config.json and weights
    prefix      attribute path of the checkpoint's module inside the exported wrapper, with a trailing dot
    per_bucket  False where the graph is the same for every bucket (text encoders run one prompt at a time)
    weightless  captured under fake tensors: no memory for weights; False where the exporter needs real tensors
    spec        (source, bucket, classifier_free_guidance) -> signature
    module      (source, dtype name, classifier_free_guidance) -> the wrapper to export, built from the config alone
    reference   (source, classifier_free_guidance) -> the same wrapper with the checkpoint's weights in float32
    """

    name: str
    folder: str
    prefix: str
    per_bucket: bool
    weightless: bool
    spec: Callable[[ModelSource, Bucket, bool], GraphSpec]
    module: Callable[[ModelSource, ComponentRecipe, bool], nn.Module]
    reference: Callable[[ModelSource, bool], nn.Module]


@dataclass(frozen=True)
class Family:
    """A kind of model: its components in the order in which a picture passes through them.

    pipelines  diffusers pipeline classes that are of this family
    check      (source) -> raises ModelError for what this family does not cover, before any long work
    settings   (source) -> what the runtime must know of the model, as JSON
    """

    name: str
    pipelines: tuple[str, ...]
    components: tuple[Component, ...]
    check: Callable[[ModelSource], None]
    settings: Callable[[ModelSource], dict[str, Any]]

    def component(self, name: str) -> Component:
        return next(c for c in self.components if c.name == name)
