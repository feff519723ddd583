"""Torch wrapper of the safety checker. Only imported when something is exported or compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

SPECIAL_ADJUSTMENT = 0.01


class SafetyChecker(nn.Module):
    """diffusers' StableDiffusionSafetyChecker without its loops: image [1, 3, S, S] -> scores [1, 17], flagged [1]."""

    def __init__(self, checker: nn.Module, dtype: str) -> None:
        super().__init__()
        self.checker = checker
        # Where the vision model keeps its positions differs between releases of transformers.
        self.embeddings = next(name for name, m in checker.named_modules() if "position_ids" in m._buffers)
        vision = checker.get_submodule(self.embeddings)
        self.positions = vision.get_buffer("position_ids").shape[-1]
        del vision.position_ids
        self.dtype: torch.dtype = getattr(torch, dtype)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [1, 17] float32, above 0 for what is unsafe, and flagged [1] int64: 1 where any score is."""
        checker: Any = self.checker
        embeddings: Any = checker.get_submodule(self.embeddings)
        # Set here, because the model's own are a buffer outside the checkpoint, which has no values under fake tensors.
        embeddings.position_ids = torch.arange(self.positions)[None]
        pooled = checker.vision_model(image.to(self.dtype))[1]
        embeddings.position_ids = None
        embedded = nn.functional.normalize(checker.visual_projection(pooled))
        special = _cosine(embedded, checker.special_care_embeds) - checker.special_care_embeds_weights.float()
        care = _above_zero(special).float()[:, None] * SPECIAL_ADJUSTMENT
        scores = _cosine(embedded, checker.concept_embeds) - checker.concept_embeds_weights.float() + care
        return scores, _above_zero(scores).long()


def _cosine(normalized: Tensor, concepts: Tensor) -> Tensor:
    return torch.mm(normalized, nn.functional.normalize(concepts).t()).float()


def _above_zero(scores: Tensor) -> Tensor:
    """[B, N] -> [B]: whether any is above 0 when rounded to three places."""
    return ((scores * 1000).round() > 0).any(dim=1)
