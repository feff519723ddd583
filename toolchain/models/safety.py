"""The safety checker of Stable Diffusion 1.x: a CLIP vision model that compares pictures with concepts.

The network looks at what `feature_extractor` makes of the finished picture; `runtime.safety` does that without
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError
from toolchain.models.component import Component
from toolchain.models.networks import load_weights
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe
from toolchain.settings import SafetyInput
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

CHECKER, EXTRACTOR = "safety_checker", "feature_extractor"
CLASSES = ("StableDiffusionSafetyChecker",)
EXTRACTORS = ("CLIPImageProcessor", "CLIPFeatureExtractor", "CLIPImageProcessorPil", "CLIPImageProcessorFast")
CONCEPTS = 17
BICUBIC = 3
# The one that diffusers' class can have; a config could name a kernel that transformers would fetch and run.
ATTENTION = "eager"
# transformers' defaults of CLIP, where preprocessor_config.json is silent.
SIDE = 224
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


COMPILED, LEFT_OUT = "compiled", "left out"


def state(source: ModelSource, recipe: Recipe) -> str | None:
    """COMPILED or LEFT_OUT; None for a model that neither has nor requires a safety checker."""
    if recipe.safety.checker:
        return COMPILED
    has = source.index.get(CHECKER) not in (None, [None, None])
    return LEFT_OUT if has or source.index.get("requires_safety_checker") is True else None


def extracted(source: ModelSource) -> SafetyInput:
    """The preprocessing that the model's feature extractor asks for. ModelError where it is not CLIP's."""
    config, where = source.config(EXTRACTOR), source.path / EXTRACTOR / "preprocessor_config.json"
    size, crop = config.get("size", SIDE), config.get("crop_size", SIDE)
    resize = size.get("shortest_edge") if isinstance(size, dict) else size
    sides = {crop.get("height"), crop.get("width")} if isinstance(crop, dict) else {crop}
    fixed = {"resample": BICUBIC, "rescale_factor": 1 / 255}
    fixed |= dict.fromkeys(("do_resize", "do_center_crop", "do_rescale", "do_normalize"), True)
    others = {key: config[key] for key, value in fixed.items() if config.get(key, value) != value}
    (side,) = sides if len(sides) == 1 else (None,)
    if others or type(resize) is not int or type(side) is not int or side > resize:
        raise ModelError(
            "the runtime does not support the safety checker's preprocessing",
            where=where,
            expected="a shortest edge, resized with resample = 3, and a square cut out of its middle",
            got=f"size = {size}, crop_size = {crop}" + "".join(f", {k} = {v}" for k, v in others.items()),
        )
    return SafetyInput(resize, side, tuple(config.get("image_mean", MEAN)), tuple(config.get("image_std", STD)))


def _config(source: ModelSource) -> Any:
    from transformers import CLIPConfig

    given = {key: value for key, value in source.config(CHECKER).items() if key not in ("dtype", "torch_dtype")}
    return CLIPConfig(**given | {"attn_implementation": ATTENTION})


def _spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
    side = extracted(source).crop
    return GraphSpec(
        (TensorSpec("image", "float32", (1, 3, side, side)),),
        (TensorSpec("scores", "float32", (1, CONCEPTS)), TensorSpec("flagged", "int64", (1,))),
    )


def _module(source: ModelSource, recipe: Recipe) -> nn.Module:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    from toolchain.models.construct import construct
    from toolchain.models.safety_module import SafetyChecker

    precision = recipe.component(CHECKER)
    config = _config(source)
    config.vision_config.dtype = precision.dtype
    checker = construct(lambda: StableDiffusionSafetyChecker(config), precision.dtype, precision.keep_float32, CHECKER)
    return SafetyChecker(checker, precision.dtype)


def _reference(source: ModelSource, recipe: Recipe) -> nn.Module:
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    from toolchain.models.safety_module import SafetyChecker

    checker = load_weights(StableDiffusionSafetyChecker, source, CHECKER, attn_implementation=ATTENTION)
    return SafetyChecker(checker, "float32")


def safety_checker() -> Component:
    """The checker: a picture preprocessed for CLIP [1, 3, S, S] -> scores [1, 17], above 0 for what is unsafe, and
    `flagged` [1] int64: 1 where any is, rounded as diffusers does."""
    return Component(
        name=CHECKER,
        folder=CHECKER,
        prefix="checker.",
        per_bucket=False,
        spec=_spec,
        module=_module,
        reference=_reference,
    )
