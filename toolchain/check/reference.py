"""Loading the reference: a component's torch module or the whole diffusers pipeline, both in float32."""

from __future__ import annotations

import gc
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError
from toolchain.models.component import Component, Family
from toolchain.models.hub import SAFETY_FOLDERS, UNUSED_FOLDERS
from toolchain.models.single_file import quiet_libraries
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe
from toolchain.sampler.schedulers import MODEL, create
from toolchain.sampler.spec import SchedulerSpec

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def reference_module(component: Component, source: ModelSource, recipe: Recipe) -> Iterator[nn.Module]:
    """The module with the checkpoint's weights, freed at the end. ModelError if it cannot be loaded."""
    with _loading(source):
        module = component.reference(source, recipe).requires_grad_(False)
    try:
        yield module
    finally:
        module.to("meta")  # whoever still has a name for the module holds an empty shell
        gc.collect()


def reference_pipeline(source: ModelSource, family: Family, recipe: Recipe) -> tuple[Any, list[str]]:
    """The family's diffusers pipeline, with the scheduler that diffusers gives it.

    Also a line for each difference from what diffusers loads by default. ModelError if it cannot be loaded.
    """
    import diffusers
    import torch

    # Folders that are not downloaded, because nothing here compiles them; and a mark on finished pictures.
    unused = [name for name in UNUSED_FOLDERS if not (recipe.safety.checker and name in SAFETY_FOLDERS)]
    without = {**dict.fromkeys(unused), "add_watermarker": False}
    if not recipe.safety.checker:
        without["requires_safety_checker"] = False
    left_out = [name for name in unused if source.index.get(name) not in (None, [None, None])]
    with _loading(source):
        cls = getattr(diffusers, family.pipeline)
        accepted = inspect.signature(cls.__init__).parameters
        kwargs: dict[str, Any] = {key: value for key, value in without.items() if key in accepted}
        # Each by its own loader: a pipeline's takes one variant of the weights for all, and attention from the config.
        for component in family.parts(recipe):
            if component.folder not in kwargs:
                module = component.reference(source, recipe)
                kwargs[component.folder] = module.get_submodule(component.prefix.rstrip("."))
        for component in family.components:
            if component.tokenizer and component not in family.parts(recipe):
                kwargs |= {component.folder: None, component.tokenizer: None}
                left_out.append(component.folder)
        pipeline = cls.from_pretrained(source.path, dtype=torch.float32, use_safetensors=True, **kwargs)
    pipeline.set_progress_bar_config(disable=True)
    changes = ["float32 throughout"]
    if source.index["_class_name"] != family.pipeline:
        changes.append(f"{family.pipeline} in place of {source.index['_class_name']}")
    if left_out:
        changes.append("without " + ", ".join(left_out))
    if "add_watermarker" in kwargs:
        changes.append("without a watermark, which diffusers adds where invisible-watermark is installed")
    return pipeline, changes


def reference_scheduler(loaded: Any, spec: SchedulerSpec) -> Any:
    """The diffusers scheduler for `spec`, made as a user makes it: from `loaded`, which came with the pipeline. It is
    `loaded` itself where the spec is the model's own. SamplerError where diffusers cannot make it."""
    if spec.canonical == MODEL:
        return loaded
    return create(spec, {**loaded.config, "_class_name": type(loaded).__name__})


def text_length(source: ModelSource, family: Family, recipe: Recipe) -> dict[str, int]:
    """The pipeline's argument for the length of T5's prompt, where the recipe has a T5; its defaults differ."""
    for component in family.parts(recipe):
        if component.tokenizer and source.class_of(component.folder).startswith("T5"):
            ids = component.spec(source, recipe.buckets[0], recipe).input("ids")
            return {"max_sequence_length": ids.shape[1]}
    return {}


@contextmanager
def _loading(source: ModelSource) -> Iterator[None]:
    """Silences the libraries' progress bars and advice: a check reports its own progress. ModelError where loading
    fails."""
    try:
        with quiet_libraries():
            yield
    except (OSError, ValueError) as error:
        raise ModelError(
            "the reference cannot be loaded", where=source.path, got=error, hint="download the model again"
        ) from error
