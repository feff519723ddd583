"""Both halves of a VAE, and what each family's pipeline does with latents before and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.errors import ModelError
from toolchain.models import parts
from toolchain.models.component import Component
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

Factor = float | tuple[float, ...]
Factors = Callable[[Mapping[str, Any]], tuple[Factor, Factor]]
"""The VAE's config -> what latents are multiplied with before a run, after the second was taken off; a number or one of
each channel. Which settings a pipeline reads is the pipeline's: that a VAE's config has them is no sign."""
SCALE = 0.18215
"""What diffusers takes where the config is silent."""


def scaled(config: Mapping[str, Any]) -> tuple[Factor, Factor]:
    """SD reads scaling_factor alone."""
    return float(config.get("scaling_factor", SCALE)), 0.0


def shifted(config: Mapping[str, Any]) -> tuple[Factor, Factor]:
    """SD3 and FLUX read shift_factor too."""
    return float(config.get("scaling_factor", SCALE)), float(config["shift_factor"])


def normalised(config: Mapping[str, Any]) -> tuple[Factor, Factor]:
    """SDXL reads latents_mean and latents_std, where there are both."""
    scale, mean, std = scaled(config)[0], config.get("latents_mean"), config.get("latents_std")
    if mean is None or std is None:
        return scale, 0.0
    assert isinstance(scale, float)
    return tuple(scale / float(s) for s in std), tuple(map(float, mean))


def check(source: ModelSource, factors: Factors) -> None:
    """ModelError for a VAE of other channels than pictures have, and without what the pipeline reads of its config."""
    config, where = source.config("vae"), source.path / "vae" / "config.json"
    latents = source.setting("vae", "latent_channels")
    parts.check_sizes(source, {("vae", "latent_channels"): latents})
    for key in ("in_channels", "out_channels"):
        if config.get(key, 3) != 3:
            what = "the VAE's pictures have other channels than red, green and blue"
            raise ModelError(what, where=where, expected=f"{key} = 3", got=config[key])
    try:
        found = factors(config)
    except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
        raise ModelError(
            "the VAE's config does not say how latents are scaled",
            where=where,
            expected="numbers: scaling_factor; shift_factor of SD3 and FLUX; latents_mean and latents_std, if any",
            got=f"{type(error).__name__}: {error}",
        ) from error
    for factor in found:
        if isinstance(factor, tuple) and len(factor) != latents:
            what = "the VAE's latents are normalised in other channels than they have"
            expected = f"latents_mean and latents_std of {latents} numbers, its latent_channels"
            raise ModelError(what, where=where, expected=expected, got=f"{len(factor)} numbers")


def _component(name: str, factors: Factors, spec: Callable[..., GraphSpec], wrapper: str, optional: bool) -> Component:
    def wrap(vae: nn.Module, source: ModelSource, dtype: str) -> nn.Module:
        from toolchain.models import modules

        made: nn.Module = getattr(modules, wrapper)(vae, *factors(source.config("vae")), dtype)
        return made

    def module(source: ModelSource, recipe: Recipe) -> nn.Module:
        vae = parts.make_network(source, "vae", "AutoencoderKL", recipe, name)
        return wrap(vae, source, recipe.component(name).dtype)

    def reference(source: ModelSource, recipe: Recipe) -> nn.Module:
        return wrap(parts.load_network(source, "vae", "AutoencoderKL"), source, "float32")

    return Component(name, "vae", "vae.", True, True, spec, module, reference, optional=optional)


def vae_decoder(factors: Factors) -> Component:
    """Latents [B, C, h, w] -> pixels [B, H, W, 3] uint8, and the same as float32 before rounding."""

    def spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
        pixels = (bucket.batch, bucket.height, bucket.width, 3)
        return GraphSpec(
            (TensorSpec("latents", "float32", parts.latent_shape(source, bucket)),),
            (TensorSpec("pixels", "uint8", pixels), TensorSpec("image", "float32", pixels)),
        )

    return _component("vae_decoder", factors, spec, "VaeDecoder", False)


def vae_encoder(factors: Factors) -> Component:
    """Pixels [B, H, W, 3] uint8 and two draws of noise -> latents [B, C, h, w]: what image to image starts from."""

    def spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
        latents = parts.latent_shape(source, bucket)
        draws = (TensorSpec(name, "float32", latents) for name in ("noise", "start_noise"))
        pixels = TensorSpec("pixels", "uint8", (bucket.batch, bucket.height, bucket.width, 3))
        scales = (TensorSpec(name, "float32", (1,)) for name in ("signal", "sigma"))
        return GraphSpec((pixels, *draws, *scales), (TensorSpec("latents", "float32", latents),))

    return _component("vae_encoder", factors, spec, "VaeEncoder", True)
