"""Options -> Request: every default filled in and everything checked against what the bundle can do."""

from __future__ import annotations

import functools
import logging
import math
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from toolchain.bundle.bundle import Bundle, describe_buckets
from toolchain.errors import RequestError
from toolchain.runtime import request as ask
from toolchain.runtime.progress import F32
from toolchain.runtime.request import Options, Request, Size
from toolchain.sampler.schedulers import parse, steps_of
from toolchain.sampler.spec import LISTS, with_list
from toolchain.sampler.table import skipped_steps

log = logging.getLogger("toolchain")
FLUX = "flux"
REBUILD_GUIDED = "set classifier_free_guidance = true in the recipe and build again"


def resolve(bundle: Bundle, options: Options) -> Request:
    """The request that a call's options ask for. RequestError for anything that the bundle cannot do."""
    if options.callback is not None and not callable(options.callback):
        expected = "a function of one Progress"
        raise RequestError("callback cannot be called", expected=expected, got=type(options.callback).__name__)
    given = [options.prompt, options.prompt_2, options.prompt_3]
    texts = ask.texts_by_encoder(bundle, "prompt", given, None)
    prompts = ask.check_texts("prompt", options.prompt)
    count = len(prompts)
    guidance, true_cfg = _guidance(bundle, options), _true_cfg(bundle, options)
    negatives, negative_texts = _negatives(bundle, options, count, true_cfg)
    scheduler, steps = _schedule(bundle, options)
    images = None if options.image is None else ask.check_images(options.image, count)
    size, run_size = _sizes(bundle, options, images)
    return Request(
        prompts=prompts,
        negatives=negatives,
        texts=texts,
        negative_texts=negative_texts,
        seeds=ask.check_seeds(options.seed, count),
        scheduler=scheduler,
        steps=steps,
        skip=_skip(bundle, options, steps),
        guidance=guidance,
        guidance_rescale=_rescale(bundle, options),
        true_cfg=true_cfg,
        clip_skip=_clip_skip(bundle, options),
        size=size,
        run_size=run_size,
        time_ids=_time_ids(bundle, options, run_size),
        latents=_latents(options),
        images=None if images is None else _pixels(images, run_size, count),
        encoded_with=[i % len(images) if images and bundle.settings.encode_once else i for i in range(count)],
    )


def _schedule(bundle: Bundle, options: Options) -> tuple[str, int]:
    """(canonical scheduler, with its list where there is one; steps)"""
    defaults = bundle.recipe.sampling
    name = defaults.scheduler if options.scheduler is None else options.scheduler
    if not isinstance(name, str):
        raise RequestError("scheduler is not a name", expected="a string such as 'euler'", got=repr(name))
    for key in LISTS:
        if (values := getattr(options, key)) is not None:
            name = with_list(name, key, values)
    spec = parse(name)
    given = ask.check_steps(defaults.steps if options.steps is None else options.steps)
    steps = steps_of(spec, bundle.settings.scheduler, given)
    if spec.lists and options.steps not in (None, steps):
        log.warning("steps has no effect beside a list of timesteps or sigmas, here for %d; as in diffusers", steps)
    return spec.canonical, ask.check_steps(steps)


def _step_inputs(bundle: Bundle) -> set[str]:
    return {t.name for t in bundle.engine("denoiser", bundle.buckets[0]).spec.inputs}


@functools.cache
def _warn_once(bundle: Path, text: str) -> None:
    log.warning("%s; as in diffusers", text)


def _negatives(
    bundle: Bundle, options: Options, count: int, true_cfg: float
) -> tuple[list[str] | None, list[dict[str, str]] | None]:
    first = "" if options.negative_prompt is None else options.negative_prompt
    others = [options.negative_prompt_2, options.negative_prompt_3]
    negatives = ask.repeat("negative_prompt", ask.check_texts("negative_prompt", first), count)
    texts = ask.texts_by_encoder(bundle, "negative_prompt", [first, *others], count)
    stated = next((text for texts_ in texts for text in texts_.values() if text), None)
    guided = bundle.recipe.classifier_free_guidance
    # Without guidance diffusers does not look at it; but where nobody says so, its guidance would be above 1.
    if true_cfg == 1 if bundle.family == FLUX else not guided and options.guidance is not None:
        if stated:
            needed = "true_cfg above 1 beside negative_prompt" if bundle.family == FLUX else "guidance above 1"
            _warn_once(bundle.path, f"a negative prompt has no effect without {needed}")
        return [""] * count, [dict.fromkeys(t, "") for t in texts]
    if stated and not guided:
        raise RequestError("a bundle without guidance cannot use a negative prompt", got=stated, hint=REBUILD_GUIDED)
    if options.negative_prompt is None and bundle.settings.zero_negative:
        # SDXL's pipeline then takes zeros, whatever the others say.
        if others != [None, None]:
            _warn_once(bundle.path, "negative_prompt_2 has no effect without negative_prompt, which may be empty")
        return None, None
    return negatives, texts


def _guidance(bundle: Bundle, options: Options) -> float:
    value = bundle.default_guidance if options.guidance is None else options.guidance
    if bundle.settings.embedded_guidance:
        return ask.check_number("guidance", value, "a number of 0 or more", 0.0, math.inf)
    if bundle.family != FLUX:
        return ask.check_guidance(value, bundle.recipe.classifier_free_guidance)
    if ask.check_guidance(value, guided=True) > 1 and options.guidance is not None:
        _warn_once(bundle.path, "guidance has no effect on this model, which was distilled without it (FLUX schnell)")
    return 1.0


def _true_cfg(bundle: Bundle, options: Options) -> float:
    """The scale of FLUX's second pass; 1 where there is none."""
    if options.true_cfg is None:
        return 1.0
    scale = max(1.0, ask.check_number("true_cfg", options.true_cfg, "a number of 0 or more", 0, 1e6))
    if bundle.family == FLUX and (scale == 1 or options.negative_prompt is None):
        if scale > 1:
            _warn_once(bundle.path, "true_cfg has no effect without negative_prompt, which may be empty")
        return 1.0
    if "true_cfg" not in _step_inputs(bundle):
        raise RequestError(
            "the bundle has no true classifier-free guidance",
            where=bundle.path,
            got=f"true_cfg = {options.true_cfg}",
            hint=REBUILD_GUIDED + ", for a model of family flux; others take guidance",
        )
    return scale


def _rescale(bundle: Bundle, options: Options) -> float:
    value = ask.check_number("guidance_rescale", options.guidance_rescale, "a number from 0 to 1", 0, 1)
    if value and ("guidance_rescale" not in _step_inputs(bundle) or not bundle.recipe.classifier_free_guidance):
        raise RequestError("the bundle has no guidance that could be rescaled", where=bundle.path, got=value)
    return value


def _clip_skip(bundle: Bundle, options: Options) -> int:
    most = bundle.settings.max_clip_skip
    if type(options.clip_skip) is not int or not 0 <= options.clip_skip <= most:
        expected = f"an integer from 0 to {most}" if most else "0: the model has no such option"
        raise RequestError("clip_skip is not a number of layers", expected=expected, got=repr(options.clip_skip))
    return options.clip_skip


def _latents(options: Options) -> F32 | None:
    if options.latents is None:
        return None
    if options.image is not None:
        raise RequestError("latents and image exclude each other", expected="one of them", got="both")
    return ask.check_latents(options.latents)


def _skip(bundle: Bundle, options: Options, steps: int) -> int:
    if options.image is None:
        if options.strength is not None:
            raise RequestError("strength is for image to image", expected="an image beside it", got=options.strength)
        return 0
    if "vae_encoder" not in bundle.engines:
        raise RequestError(
            "the bundle was built without image to image",
            where=bundle.path,
            hint="remove vae_encoder from `without` in the recipe and build again",
        )
    strengths = bundle.recipe.sampling.strengths
    default = strengths[0] if strengths else ask.STRENGTH
    expected = "a number above 0, at most 1"
    strength = ask.check_number("strength", default if options.strength is None else options.strength, expected, 0, 1)
    skip = skipped_steps(steps, strength, early_start=bundle.settings.early_start)
    if skip >= steps:
        raise RequestError(
            "the strength leaves no step to run", expected=f"more than {1 / steps:.3g} for {steps} steps", got=strength
        )
    return skip


def _sizes(bundle: Bundle, options: Options, images: list[Image.Image] | None) -> tuple[Size, Size]:
    """(size of the pictures, size of the bucket to run)"""
    if options.aspect is not None and options.size is not None:
        raise RequestError("size and aspect exclude each other", expected="one of them", got="both")
    if options.size is not None:
        size = ask.check_pair("size", options.size, 1)
        return size, _bucket_size(bundle, size, options.crop)
    built = list(dict.fromkeys((b.height, b.width) for b in bundle.buckets))
    if options.aspect is not None:
        aspect = ask.check_number("aspect", options.aspect, "width / height, above 0", 1e-3, 1e3)
    elif images is None:
        return built[0], built[0]
    elif (images[0].height, images[0].width) in built:
        aspect, built = 1.0, [(images[0].height, images[0].width)]
    else:
        aspect = images[0].width / images[0].height
    nearest = min(built, key=lambda size: abs(math.log(size[1] / size[0] / aspect)))
    return nearest, nearest


def _bucket_size(bundle: Bundle, size: Size, crop: bool) -> Size:
    sizes = {(b.height, b.width) for b in bundle.buckets}
    if size in sizes:
        return size
    larger = [s for s in sizes if s[0] >= size[0] and s[1] >= size[1]]
    if crop and larger:
        return min(larger, key=lambda s: (s[0] * s[1], s))
    raise RequestError(
        "no engine was built for this size",
        where=bundle.path,
        expected=describe_buckets(bundle.buckets) + " (batch x height x width)",
        got=f"{size[0]}x{size[1]}",
        hint="cut it out of the nearest larger bucket with --crop (crop=True)"
        if larger
        else "add the bucket to the recipe and build again",
    )


def _time_ids(bundle: Bundle, options: Options, run_size: Size) -> tuple[tuple[int, ...], tuple[int, ...]]:
    names = [
        f"{sign}{what}" for sign in ("", "negative_") for what in ("original_size", "crop_top_left", "target_size")
    ]
    values = {name: getattr(options, name) for name in names}
    given = [name for name, value in values.items() if value not in (None, (0, 0), [0, 0])]
    if given and "time_ids" not in _step_inputs(bundle):
        raise RequestError("the model is not conditioned on sizes", where=bundle.path, got=", ".join(given))
    for name in given:
        values[name] = ask.check_pair(name, values[name], 0 if "crop" in name else 1)
    positive = (*(values["original_size"] or run_size), *values["crop_top_left"], *(values["target_size"] or run_size))
    original, target = values["negative_original_size"], values["negative_target_size"]
    if options.image is not None:  # here diffusers fills in each size on its own, and knows one crop
        return positive, (*(original or positive[:2]), *values["crop_top_left"], *(target or positive[4:]))
    if original is None or target is None:  # diffusers takes the negative's only where both sizes are there
        return positive, positive
    return positive, (*original, *values["negative_crop_top_left"], *target)


def _pixels(images: list[Image.Image], size: Size, count: int) -> NDArray[np.uint8]:
    """uint8 [N, H, W, 3] for `count` pictures, resized as diffusers does, and repeated in its order: a, b, a, b."""
    height, width = size
    wanted = [i if i.size == (width, height) else i.resize((width, height), Image.Resampling.LANCZOS) for i in images]
    return np.stack([np.asarray(wanted[i % len(wanted)], np.uint8) for i in range(count)])
