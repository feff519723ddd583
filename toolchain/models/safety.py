"""The safety checker of Stable Diffusion 1.x: a CLIP vision model that compares pictures with concepts.

The network looks at what `feature_extractor` makes of the finished picture; `runtime.safety` does that without
transformers.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError
from toolchain.models.component import Component
from toolchain.models.refusals import refuse_code
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
    """What becomes of the model's safety checker; None for a model that neither has nor requires one."""
    if recipe.safety.checker:
        return COMPILED
    has = source.index.get(CHECKER) not in (None, [None, None])
    return LEFT_OUT if has or source.index.get("requires_safety_checker") is True else None


def check(source: ModelSource, recipe: Recipe) -> None:
    """ModelError for a checker that is to be compiled and is not there, or not the one that this compiles."""
    if not recipe.safety.checker:
        return
    for name, classes in ((CHECKER, CLASSES), (EXTRACTOR, EXTRACTORS)):
        entry = source.index.get(name)
        if not (isinstance(entry, list) and len(entry) == 2 and entry[1] in classes):
            raise ModelError(
                f"the model has no {name.replace('_', ' ')} that could be compiled",
                where=source.path / "model_index.json",
                expected=" or ".join(classes),
                got=repr(entry),
                hint="remove safety.checker from the recipe, or take a model that comes with one",
            )
    refuse_code(source, CHECKER)
    extracted(source)


def extracted(source: ModelSource) -> SafetyInput:
    """How a picture becomes what the checker looks at. ModelError for another way than CLIP's."""
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
            "pictures are made ready for the safety checker in a way that the runtime does not repeat",
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

    from toolchain.models.modules import construct
    from toolchain.models.safety_module import SafetyChecker

    own = recipe.component(CHECKER)
    config = _config(source)
    config.vision_config.dtype = own.dtype
    made = construct(lambda: StableDiffusionSafetyChecker(config), own.dtype, own.keep_float32, CHECKER)
    return SafetyChecker(made, own.dtype)


def _reference(source: ModelSource, recipe: Recipe) -> nn.Module:
    import torch
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    from toolchain.models.safety_module import SafetyChecker

    made = StableDiffusionSafetyChecker.from_pretrained(
        source.path / CHECKER,
        dtype=torch.float32,
        use_safetensors=True,
        variant=source.variant(CHECKER),
        attn_implementation=ATTENTION,
    )
    return SafetyChecker(made.eval(), "float32")


def safety_checker() -> Component:
    """What a CLIP image processor made of a picture [1, 3, S, S] -> scores [1, 17], above 0 for what is unsafe, and
    `flagged` [1] int64: 1 where any is, rounded as diffusers does."""
    # Not weightless: the vision model's position ids are a buffer that is in no checkpoint, and it is small.
    return Component(CHECKER, CHECKER, "checker.", False, False, _spec, _module, _reference)
