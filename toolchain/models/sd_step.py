"""The denoising step of Stable Diffusion 1.x and 2.x as a torch module. Only imported for an export or a comparison."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolchain.models.step import begin, finish, guide_unet


class UNetStep(nn.Module):
    """One denoising step of SD 1.x and 2.x: scaling, guidance batch, network, guidance and update."""

    def __init__(self, unet: nn.Module, guided: bool, dtype: str) -> None:
        super().__init__()
        self.unet = unet
        self.guided = guided
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(
        self,
        state: Tensor,
        step: Tensor,
        timesteps: Tensor,
        table: Tensor,
        noise: Tensor,
        guidance: Tensor,
        guidance_rescale: Tensor,
        context: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation: the next state [D, B, C, h, w] float32 and the next step [1] int64."""
        row, latents, time = begin(state, step, timesteps, table, self.guided, self.dtype)
        output = self.unet(latents, time, context.to(self.dtype), return_dict=False)[0]
        output = guide_unet(output, self.guided, guidance, guidance_rescale)
        return finish(row, state, step, output, noise)
