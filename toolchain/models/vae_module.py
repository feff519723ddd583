"""Torch wrappers of both halves of a VAE. Only imported when something is exported or compared."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn

Factor = float | tuple[float, ...]
"""What latents are multiplied with or shifted by: one number, or one for each channel."""


def per_channel(factor: Factor) -> float | Tensor:
    """A factor of latents [B, C, h, w]. Made by numpy, for what torch makes under fake tensors has no values."""
    if isinstance(factor, float):
        return factor
    return torch.from_numpy(np.array(factor, np.float32).reshape(1, -1, 1, 1))


class VaeEncoder(nn.Module):
    """Pixels [B, H, W, 3] uint8 -> what image to image starts from: noised latents [B, C, h, w] float32.

    noise        [B, C, h, w] float32, standard normal: samples the posterior, as diffusers does with the request's
                 generator
    start_noise  [B, C, h, w] float32, standard normal
    signal       [1] float32: what the scaled latents are multiplied with
    sigma        [1] float32: what the start noise is
    """

    def __init__(self, vae: nn.Module, scaling_factor: Factor, shift_factor: Factor, dtype: str) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(self, pixels: Tensor, noise: Tensor, start_noise: Tensor, signal: Tensor, sigma: Tensor) -> Tensor:
        """The noised latents."""
        image = (2 * (pixels.float() / 255) - 1).permute(0, 3, 1, 2)
        posterior = self.vae.encode(image.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        sample: Tensor = posterior.mean.float() + posterior.std.float() * noise
        latents = (sample - per_channel(self.shift_factor)) * per_channel(self.scaling_factor)
        return signal * latents + sigma * start_noise


class VaeDecoder(nn.Module):
    """Latents [B, C, h, w] float32 -> pixels [B, H, W, 3] uint8, and the same before rounding as float32 in [0, 1]."""

    def __init__(self, vae: nn.Module, scaling_factor: Factor, shift_factor: Factor, dtype: str) -> None:
        super().__init__()
        self.vae = vae
        self.scaling_factor = scaling_factor
        self.shift_factor = shift_factor
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(self, latents: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels as uint8, and as float32 before rounding."""
        latents = latents / per_channel(self.scaling_factor) + per_channel(self.shift_factor)
        decoded: Tensor = self.vae.decode(latents.to(self.dtype), return_dict=False)[0]  # type: ignore[operator]
        image = (decoded.float() / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        return (image * 255).round().to(torch.uint8), image
