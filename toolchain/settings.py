"""Settings of a model that the runtime needs beside its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class SafetyInput:
    """How a picture is preprocessed for the safety checker.

    resize  pixels of its shortest edge after resizing
    crop    side in pixels of the square that is then cut out of the centre
    mean    of each channel in [0, 1], subtracted
    std     of each channel in [0, 1], divided by
    """

    resize: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]


@dataclass(frozen=True)
class ModelSettings:
    """What a family derives from a model's configs for the runtime; stored in the bundle.

    scheduler          the model's scheduler_config.json
    vae_factor         pixels per latent, along each side
    multiple           what height and width of a bucket must be divisible by, in pixels
    token_pixels       pixels per token of the network, along each side: dynamic shifting counts tokens
    linear_sigmas      the pipeline gives its scheduler sigmas that fall linearly from 1 to 1 / steps (FLUX)
    zero_negative      no negative prompt is zeros in place of an embedding, not the empty prompt's (SDXL)
    embedded_guidance  guidance is an input of the network and needs no second pass (FLUX dev)
    encode_once        image to image with fewer pictures than prompts encodes each picture once, with the generator of
                       its first prompt, and the others' generators draw nothing for it (FLUX)
    early_start        image to image rounds the first step down, not up, where strength falls between two steps
    max_clip_skip      most layers that clip skip can leave out; 0 where the model has no such option
    safety             of a bundle with a safety checker
    """

    scheduler: Mapping[str, Any]
    vae_factor: int
    multiple: int
    token_pixels: int
    linear_sigmas: bool = False
    zero_negative: bool = False
    embedded_guidance: bool = False
    encode_once: bool = False
    early_start: bool = False
    max_clip_skip: int = 0
    safety: SafetyInput | None = None

    def tokens(self, height: int, width: int) -> int:
        """Tokens of a picture, where the scheduler shifts by their number; 0 where it does not."""
        if not self.scheduler.get("use_dynamic_shifting"):
            return 0
        return (height // self.token_pixels) * (width // self.token_pixels)

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ModelSettings:
        """The inverse of `to_json`. TypeError for unknown or missing fields."""
        given = data.get("safety")
        if given is None:
            return cls(**data)
        safety = SafetyInput(given["resize"], given["crop"], tuple(given["mean"]), tuple(given["std"]))
        return cls(**{**data, "safety": safety})
