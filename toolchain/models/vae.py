"""Both halves of a VAE, and what each family's pipeline does with latents before and after it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from toolchain.models.component import Component
from toolchain.models.networks import load_network, make_network
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe
from toolchain.signature import GraphSpec, TensorSpec

if TYPE_CHECKING:
    from torch import nn

    from toolchain.models.vae_module import Factor

    Factors = Callable[[Mapping[str, Any]], tuple[Factor, Factor]]
    """The VAE's config -> (scale, shift): latents before a run are (sample - shift) * scale. Which settings a pipeline
    reads depends on the pipeline, not on whether a VAE's config has them."""

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


def vae_factor(source: ModelSource) -> int:
    """Pixels per latent along each side."""
    return int(2 ** (len(source.setting("vae", "block_out_channels")) - 1))


def latent_shape(source: ModelSource, bucket: Bucket) -> tuple[int, int, int, int]:
    """[B, C, h, w]"""
    factor = vae_factor(source)
    return bucket.batch, int(source.setting("vae", "latent_channels")), bucket.height // factor, bucket.width // factor


def _component(
    name: str,
    factors: Factors,
    spec: Callable[..., GraphSpec],
    wrapper: str,
    modules: tuple[str, ...],
    *,
    optional: bool = False,
) -> Component:
    def wrap(vae: nn.Module, source: ModelSource, dtype: str) -> nn.Module:
        from toolchain.models import vae_module

        half: nn.Module = getattr(vae_module, wrapper)(vae, *factors(source.config("vae")), dtype)
        return half

    def module(source: ModelSource, recipe: Recipe) -> nn.Module:
        vae = make_network(source, "vae", "AutoencoderKL", recipe, name)
        return wrap(vae, source, recipe.component(name).dtype)

    def reference(source: ModelSource, recipe: Recipe) -> nn.Module:
        return wrap(load_network(source, "vae", "AutoencoderKL"), source, "float32")

    return Component(
        name=name,
        folder="vae",
        prefix="vae.",
        per_bucket=True,
        spec=spec,
        module=module,
        reference=reference,
        optional=optional,
        modules=modules,
    )


def vae_decoder(factors: Factors) -> Component:
    """Latents [B, C, h, w] -> pixels [B, H, W, 3] uint8, and the same as float32 before rounding."""

    def spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
        pixels = (bucket.batch, bucket.height, bucket.width, 3)
        return GraphSpec(
            (TensorSpec("latents", "float32", latent_shape(source, bucket)),),
            (TensorSpec("pixels", "uint8", pixels), TensorSpec("image", "float32", pixels)),
        )

    return _component("vae_decoder", factors, spec, "VaeDecoder", ("decoder", "post_quant_conv"))


def vae_encoder(factors: Factors) -> Component:
    """Pixels [B, H, W, 3] uint8 and two draws of noise -> latents [B, C, h, w]: what image to image starts from."""

    def spec(source: ModelSource, bucket: Bucket, recipe: Recipe) -> GraphSpec:
        latents = latent_shape(source, bucket)
        draws = (TensorSpec(name, "float32", latents) for name in ("noise", "start_noise"))
        pixels = TensorSpec("pixels", "uint8", (bucket.batch, bucket.height, bucket.width, 3))
        scales = (TensorSpec(name, "float32", (1,)) for name in ("signal", "sigma"))
        return GraphSpec((pixels, *draws, *scales), (TensorSpec("latents", "float32", latents),))

    return _component("vae_encoder", factors, spec, "VaeEncoder", ("encoder", "quant_conv"), optional=True)
