"""The denoising step as a component: one graph of the sampler's update around a family's network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.models.component import Component
from toolchain.models.networks import load_network, make_network
from toolchain.models.source import ModelSource
from toolchain.models.vae import latent_shape
from toolchain.recipe import Bucket, Recipe
from toolchain.sampler.layout import MAX_EVALUATIONS, layout_for
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

NAME = "denoiser"


def denoiser(
    folder: str,
    *,
    cls: str,
    inputs: Callable[[ModelSource, Recipe, int], Mapping[str, tuple[int, ...]]],
    wrap: Callable[[nn.Module, ModelSource, Recipe, str], nn.Module],
    scheduler: Callable[[ModelSource], Mapping[str, Any]] = lambda source: source.config("scheduler"),
    noise: Callable[[tuple[int, int, int, int]], tuple[int, ...]] = lambda latents: latents,
) -> Component:
    """The step of a family whose network is the diffusers class `cls` in `folder`.

    inputs     (source, recipe, rows) -> shapes of the family's own inputs, all float32; `rows` is the batch of the
               network, which guidance doubles
    wrap       (network, source, recipe, dtype) -> the step around the network
    scheduler  the model's config of it as its pipeline leaves it, which decides what the step must have room for
    noise      the latents' shape [B, C, h, w] -> the shape in which the diffusers pipeline draws noise
    """

    def spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
        latents = latent_shape(source, bucket)
        layout = layout_for(scheduler(source))
        state = TensorSpec("state", "float32", (layout.states, *latents))
        floats = {
            "timesteps": (MAX_EVALUATIONS,),
            "table": (MAX_EVALUATIONS, layout.width),
            "noise": noise(latents),
            "guidance": (1,),
            **inputs(source, recipe, bucket.batch * (2 if recipe.classifier_free_guidance else 1)),
        }
        return GraphSpec(
            (state, TensorSpec("step", "int64", (1,)), *(TensorSpec(n, "float32", s) for n, s in floats.items())),
            (TensorSpec("next_state", "float32", state.shape), TensorSpec("next_step", "int64", (1,))),
        )

    def module(source: ModelSource, recipe: Recipe) -> nn.Module:
        return wrap(make_network(source, folder, cls, recipe, NAME), source, recipe, recipe.component(NAME).dtype)

    def reference(source: ModelSource, recipe: Recipe) -> nn.Module:
        return wrap(load_network(source, folder, cls), source, recipe, "float32")

    return Component(
        name=NAME,
        folder=folder,
        prefix=f"{folder}.",
        per_bucket=True,
        spec=spec,
        module=module,
        reference=reference,
    )
