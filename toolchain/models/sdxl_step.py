"""The denoising step of SDXL as a torch module. Only imported when something is exported or compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolchain.models.step import begin, finish, guide_unet


class SDXLStep(nn.Module):
    """One denoising step: scaling, guidance batch, both contexts joined, network, guidance and update."""

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
        context_2: Tensor,
        pooled: Tensor,
        time_ids: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation: the next state [D, B, C, h, w] float32 and the next step [1] int64."""
        row, latents, time = begin(state, step, timesteps, table, self.guided, self.dtype)
        joined = torch.cat([context, context_2], dim=-1).to(self.dtype)
        # The sizes stay in float32, where a side of more than 2048 pixels is exact; the UNet casts
        # their embedding after it has joined it to the pooled prompt.
        added = {"text_embeds": pooled.to(self.dtype), "time_ids": time_ids}
        output = self.unet(latents, time, joined, added_cond_kwargs=added, return_dict=False)[0]
        output = guide_unet(output, self.guided, guidance, guidance_rescale)
        return finish(row, state, step, output, noise)
