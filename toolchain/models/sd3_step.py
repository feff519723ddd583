"""The denoising step of Stable Diffusion 3 as a torch module. Only imported when something is exported or compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from toolchain.models.step import begin, finish, guide, unused


class SD3Step(nn.Module):
    """One denoising step: guidance batch, all contexts joined, network, guidance and update.

    width  of the joined context
    empty  tokens of zeros that stand for T5's, where it is left out
    """

    def __init__(self, transformer: nn.Module, *, guided: bool, width: int, empty: int, dtype: str) -> None:
        super().__init__()
        self.transformer = transformer
        self.guided = guided
        self.width = width
        self.empty = empty
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(
        self,
        state: Tensor,
        step: Tensor,
        timesteps: Tensor,
        table: Tensor,
        noise: Tensor,
        guidance: Tensor,
        context: Tensor,
        context_2: Tensor,
        pooled: Tensor,
        pooled_2: Tensor,
        context_3: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One evaluation: the next state [D, B, C, h, w] float32 and the next step [1] int64."""
        row, latents, time = begin(state, step, timesteps, table, self.guided, self.dtype)
        joined = self.join(context, context_2, context_3).to(self.dtype)
        projections = torch.cat([pooled, pooled_2], dim=-1).to(self.dtype)
        output = self.transformer(latents, joined, projections, time, return_dict=False)[0]
        output = guide(output, guidance) if self.guided else output.float() + unused(guidance)
        return finish(row, state, step, output, noise)

    def join(self, context: Tensor, context_2: Tensor, context_3: Tensor | None) -> Tensor:
        """CLIP's side by side, filled up with zeros to T5's width, and T5's tokens after them."""
        clip = torch.cat([context, context_2], dim=-1)
        clip = nn.functional.pad(clip, (0, self.width - clip.shape[-1]))
        if context_3 is None:
            context_3 = clip.new_zeros(clip.shape[0], self.empty, self.width)
        return torch.cat([clip, context_3], dim=1)
