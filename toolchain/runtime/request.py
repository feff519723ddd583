"""A call's options as the user gives them, and the request: every default filled in and checked before it runs."""

from __future__ import annotations

import difflib
import functools
import inspect
import logging
import math
import secrets
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from toolchain.bundle.bundle import Bundle
from toolchain.errors import RequestError
from toolchain.runtime.habits import SAME, translate
from toolchain.runtime.progress import F32, Callback
from toolchain.sampler.table import LONGEST

Size = tuple[int, int]
Texts = str | Sequence[str]
Picture = Image.Image | NDArray[np.uint8] | str | Path

log = logging.getLogger("toolchain")
STRENGTH = 0.6  # where neither the request nor the recipe says


@dataclass(frozen=True, kw_only=True)
class Options:
    """What a call of a pipeline takes. Sizes are (height, width) in pixels; None leaves the choice to the bundle.

    The call's signature is made of these fields. numpy's numbers and arrays stand for numbers and lists.

    prompt                  one or several; so many pictures are drawn
    prompt_2, prompt_3      for the second and third text encoder, where there are some; they default to `prompt`
    negative_prompt         what the picture should not show, one for all or one for each. None is what diffusers makes
                            of it: the empty prompt, or zeros for a model that was trained so (SDXL)
    negative_prompt_2, _3   for the other text encoders; they default to `negative_prompt`. Without it those of
                            SDXL and FLUX have no effect, as in diffusers
    seed                    one per picture; a single one counts up over the pictures; None draws one at random
    steps, scheduler        as in `generate`; without a table in the bundle one is compiled, where diffusers is there
    timesteps, sigmas       a list of numbers in place of `steps`, for schedulers that take one
    guidance                classifier-free guidance scale, 1 or less is none; of FLUX dev the one that is embedded, of
                            FLUX schnell without effect
    guidance_rescale        from 0 to 1, against overexposure
    true_cfg                classifier-free guidance scale of FLUX, where the bundle was built with it; 1 or less is
                            none, and the negative prompt has no effect then, nor true_cfg without a negative prompt
    clip_skip               layers of the CLIP text encoders to leave out, counted from the one usually taken
    size                    one of the built buckets, or with `crop` any smaller
    aspect                  width / height: the built bucket that comes nearest, in place of a size
    crop                    take the nearest larger bucket and cut the middle out of it
    latents                 float32 [N, C, h, w], standard normal, in place of the seed's
    image                   image to image: a PIL image or uint8 [H, W, 3], or a list of them, repeated where there are
                            fewer than prompts; it is turned upright as its EXIF data say, and resized
    strength                above 0, at most 1: how much of the schedule an image goes through
    original_size, crop_top_left, target_size, and the same with `negative_`
                            SDXL's micro-conditioning; sizes default to the picture's own
    decode                  False leaves the VAE out: the latents are the result
    callback                called after each evaluation; returning False stops the run there
    """

    prompt: Texts = field(kw_only=False)
    prompt_2: Texts | None = None
    prompt_3: Texts | None = None
    negative_prompt: Texts | None = None
    negative_prompt_2: Texts | None = None
    negative_prompt_3: Texts | None = None
    seed: int | Sequence[int] | None = None
    steps: int | None = None
    scheduler: str | None = None
    timesteps: Sequence[float] | None = None
    sigmas: Sequence[float] | None = None
    guidance: float | None = None
    guidance_rescale: float = 0.0
    true_cfg: float | None = None
    clip_skip: int = 0
    size: Size | None = None
    aspect: float | None = None
    crop: bool = False
    latents: F32 | None = None
    image: Picture | Sequence[Picture] | None = None
    strength: float | None = None
    original_size: Size | None = None
    crop_top_left: Size = (0, 0)
    target_size: Size | None = None
    negative_original_size: Size | None = None
    negative_crop_top_left: Size = (0, 0)
    negative_target_size: Size | None = None
    decode: bool = True
    callback: Callback | None = None

    @classmethod
    def of(cls, *prompt: Any, **options: Any) -> Options:
        """The options of a call. diffusers' names are taken too, where they mean the same.

        RequestError for an unknown option, with the nearest known one, and for one that has another name here.
        """
        if len(prompt) + ("prompt" in options) > 1:
            got = f"{len(prompt)} values without a name"
            raise RequestError("options are given by name", expected="pipe(prompt, steps=20)", got=got)
        known = [f.name for f in fields(cls)]
        given = translate({**dict(zip(["prompt"], prompt, strict=False)), **options})
        for name in given:
            if name not in known:
                close = difflib.get_close_matches(name, [*known, *SAME], n=1)
                hint = f"did you mean {SAME.get(close[0], close[0])}?" if close else None
                raise RequestError("a pipeline has no such option", expected=", ".join(known), got=name, hint=hint)
        arrays = ("latents", "image")
        return cls(**{"prompt": None} | {n: v if n in arrays else _plain(v) for n, v in given.items()})


def _plain(value: Any) -> Any:
    """numpy's numbers and arrays, also inside a list, as Python's."""
    if isinstance(value, np.generic | np.ndarray):
        return value.tolist()
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


Given = ParamSpec("Given")
Self = TypeVar("Self")
Outcome = TypeVar("Outcome")


def takes(
    options: Callable[Given, Options],
) -> Callable[[Callable[[Self, Options], Outcome]], Callable[Concatenate[Self, Given], Outcome]]:
    """Turns a method that takes `Options` into one that is called with their fields: type checkers, editors and `help`
    see their signature."""

    def wrap(method: Callable[[Self, Options], Outcome]) -> Callable[Concatenate[Self, Given], Outcome]:
        @functools.wraps(method)
        def call(self: Self, /, *args: Given.args, **kwargs: Given.kwargs) -> Outcome:
            return method(self, Options.of(*args, **kwargs))

        plain, theirs = inspect.signature(method), inspect.signature(options)
        first = next(iter(plain.parameters.values())).replace(kind=inspect.Parameter.POSITIONAL_ONLY)
        parameters = [first, *theirs.parameters.values()]
        vars(call)["__signature__"] = theirs.replace(parameters=parameters, return_annotation=plain.return_annotation)
        call.__doc__ = f"{inspect.getdoc(method)}\n\n{inspect.getdoc(options)}"
        return call

    return wrap


@dataclass(frozen=True)
class Request:
    """One call with everything filled in and checked.

    prompts, negatives  for the record, one per picture; negatives are None where zeros stand for them
    texts               per picture: text encoder -> text
    negative_texts      the same for the negative prompts; None for zeros
    scheduler           canonical name
    skip                steps left out by image to image
    size, run_size      of the pictures, and of the bucket that they are cut from
    time_ids            SDXL's, of the prompt and of the negative prompt
    latents             [N, C, h, w] standard normal, or None
    images              uint8 [N, H, W, 3] of run_size, or None
    encoded_with        per picture, that picture (its index) whose generator samples the image's posterior: its own, or
                        where the model encodes a repeated image once, the first that has the image
    """

    prompts: list[str]
    negatives: list[str] | None
    texts: list[dict[str, str]]
    negative_texts: list[dict[str, str]] | None
    seeds: list[int]
    scheduler: str
    steps: int
    skip: int
    guidance: float
    guidance_rescale: float
    true_cfg: float
    clip_skip: int
    size: Size
    run_size: Size
    time_ids: tuple[tuple[int, ...], tuple[int, ...]]
    latents: F32 | None
    images: NDArray[np.uint8] | None
    encoded_with: list[int]


def texts_by_encoder(
    bundle: Bundle, name: str, given: Sequence[Texts | None], count: int | None
) -> list[dict[str, str]]:
    """Per picture, text encoder -> text. `given` are the first, second and third prompt; the first stands in for the
    others. `count` pictures, or as many as there are first prompts. RequestError."""
    first = repeat(name, check_texts(name, given[0]), count)
    by_encoder = dict.fromkeys(bundle.tokenizers, first)
    for number, texts in enumerate(given[1:], start=2):
        if texts is None:
            continue
        if f"text_encoder_{number}" not in bundle.tokenizers:
            raise RequestError(
                f"the bundle has no text encoder for {name}_{number}",
                where=bundle.path,
                expected=", ".join(bundle.tokenizers),
                got=texts,
            )
        given_here = repeat(f"{name}_{number}", check_texts(f"{name}_{number}", texts), len(first))
        # diffusers takes the first prompt where the second is empty, but not where it is one of a list
        by_encoder[f"text_encoder_{number}"] = first if texts == "" else given_here
    return [{encoder: texts[i] for encoder, texts in by_encoder.items()} for i in range(len(first))]


def check_texts(name: str, value: object) -> list[str]:
    """A string or several as a list; RequestError for anything else and for an empty list."""
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(t, str) for t in texts):
        raise RequestError(f"{name} is not text", expected="a string or a list of strings", got=repr(value)[:80])
    if not texts:
        raise RequestError(f"{name} is an empty list", expected="at least one string", got=value)
    return list(texts)


def repeat(name: str, values: list[Any], count: int | None) -> list[Any]:
    """One value for each picture: as they are, or one for all."""
    if count is None or len(values) == count:
        return values
    if len(values) != 1:
        what = f"as many {name.replace('_', ' ')}s as prompts are needed"
        raise RequestError(what, expected=count, got=len(values))
    return values * count


def check_seeds(seed: int | Sequence[int] | None, count: int) -> list[int]:
    """A seed for each of `count` pictures: one counts up, None draws one at random. RequestError."""
    if seed is None:
        seed = secrets.randbits(32)
    seeds = [seed + i for i in range(count)] if type(seed) is int else seed
    expected = "an integer from 0 to 2**64 - 1, or one for each prompt"
    if not isinstance(seeds, list | tuple) or not all(type(s) is int and 0 <= s < 2**64 for s in seeds):
        raise RequestError("seed is not valid", expected=expected, got=repr(seed)[:80])
    if len(seeds) != count:
        raise RequestError("as many seeds as prompts are needed", expected=count, got=len(seeds))
    return list(seeds)


def check_latents(latents: F32) -> F32:
    """Finite float32 latents [N, C, h, w]; RequestError for anything else."""
    if (
        not isinstance(latents, np.ndarray)
        or latents.dtype != np.float32
        or latents.ndim != 4
        or not np.isfinite(latents).all()
    ):
        raise RequestError(
            "latents have the wrong type or shape",
            expected="a finite float32 array [N, C, h, w]",
            got=f"{type(latents).__name__} {getattr(latents, 'dtype', '')} {getattr(latents, 'shape', '')}",
            hint="latents.float().numpy()" if hasattr(latents, "numpy") else None,
        )
    return latents


def check_steps(steps: int) -> int:
    """An integer from 1 to LONGEST; RequestError."""
    if type(steps) is not int or not 1 <= steps <= LONGEST:
        expected = f"an integer from 1 to {LONGEST}"
        raise RequestError("steps is not a number of steps", expected=expected, got=repr(steps))
    return steps


def check_number(name: str, value: object, expected: str, least: float, most: float) -> float:
    """A finite number from `least` to `most`; RequestError."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise RequestError(f"{name} is not a number", expected=expected, got=repr(value))
    if not least <= value <= most:
        raise RequestError(f"{name} is out of range", expected=expected, got=value)
    return float(value)


def check_guidance(guidance: object, guided: bool) -> float:
    """The scale to run with; `guided` tells whether the bundle was built with classifier-free guidance."""
    value = check_number("guidance", guidance, "a finite number", -math.inf, math.inf)
    if value > 1 and not guided:
        raise RequestError(
            "the bundle was built without classifier-free guidance",
            expected="guidance of 1 or less",
            got=guidance,
            hint="set classifier_free_guidance = true in the recipe and build again",
        )
    return max(1.0, value)


def check_pair(name: str, value: object, least: int) -> Size:
    """(height, width) or (top, left) of whole numbers, also as a list; RequestError."""
    if not (isinstance(value, tuple | list) and len(value) == 2 and all(type(v) is int and v >= least for v in value)):
        expected = "(top, left) in pixels" if "crop" in name else "(height, width) in pixels"
        raise RequestError(
            f"{name} is not a {'place' if 'crop' in name else 'size'}", expected=expected, got=repr(value)
        )
    return value[0], value[1]


def check_images(image: Picture | Sequence[Picture], count: int) -> list[Image.Image]:
    """RGB images, each for every len(images)-th picture; RequestError unless they divide `count`."""
    given: list[Any] = list(image) if isinstance(image, list | tuple) else [image]
    images = []
    for one in given:
        if isinstance(one, str | Path):
            if isinstance(one, str) and one.startswith(("http://", "https://")):
                raise RequestError("an image cannot be a URL", expected="a file", got=one, hint="download it first")
            images.append(read_image(Path(one)))
            continue
        pixels = isinstance(one, np.ndarray) and one.dtype == np.uint8 and one.ndim == 3 and one.shape[2] == 3
        if not pixels and not isinstance(one, Image.Image):
            raise RequestError(
                "image is not an image",
                expected="a PIL image, its file or a uint8 array [H, W, 3], or a list of them",
                got=f"{type(one).__name__} {getattr(one, 'dtype', '')} {getattr(one, 'shape', '')}".strip(),
            )
        if 0 in (one.shape if isinstance(one, np.ndarray) else one.size):
            raise RequestError("image has no pixels", expected="at least one", got=f"{type(one).__name__} of size 0")
        images.append(Image.fromarray(one) if isinstance(one, np.ndarray) else to_rgb(one))
    if not images or count % len(images):
        expected = f"{count}, or a number that divides it"
        raise RequestError("as many images as prompts are needed", expected=expected, got=len(images))
    return images


def read_image(path: Path) -> Image.Image:
    """An image file as RGB, as `diffusers.utils.load_image` reads it. Raises RequestError."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except Exception as error:  # as in `to_rgb`, and whatever the disk says
        got = error.got if isinstance(error, RequestError) else error
        expected = "a PNG, JPEG or WebP file"
        raise RequestError("the image cannot be read", where=path, expected=expected, got=got) from None


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture that `diffusers.utils.load_image` makes of it: turned upright as its EXIF data say, then RGB. Raises
    RequestError for what cannot be decoded.

    Alpha is dropped, not blended; of an animation the frame at hand is taken, and 16-bit and float values above 255
    are cut off. The latter two are said.
    """
    try:
        frames = getattr(image, "n_frames", 1)
        upright = ImageOps.exif_transpose(image)
        with warnings.catch_warnings():  # Pillow advises to keep the alpha of a palette, which is dropped here
            warnings.simplefilter("ignore", UserWarning)
            rgb = upright.convert("RGB")
    except Exception as error:  # Pillow's decoders raise anything for a damaged file
        raise RequestError("the image cannot be decoded", got=error) from error
    if frames > 1:
        log.warning("the image has %d frames; frame %d of them is taken", frames, image.tell() + 1)
    if upright.mode.startswith(("I", "F")) and upright.getextrema()[1] > 255:  # type: ignore[operator]
        log.warning("the image's values above 255 are cut off, as in diffusers; scale them to 8 bits")
    return rgb
