"""Torch wrappers of the text encoders. Only imported when something is exported or compared."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ClipTextEncoder(nn.Module):
    """Token ids [1, L] int64 -> a hidden state [1, L, E] and the pooled output [1, P], each where wanted, in float32.

    layer     the hidden state to take, counted from the last, which is 1; `clip_skip` [1] int64 counts on from there.
              None: no hidden state and no input clip_skip
    normed    whether the final layer norm is applied to it
    pooled    whether the pooled output is wanted: projected where the model has a projection

    mask [1, L] int64, where it is given, is 0 for padding, which no token attends to then.
    """

    def __init__(self, text: nn.Module, *, layer: int | None, normed: bool, pooled: bool) -> None:
        super().__init__()
        self.text = text
        self.layer = layer
        self.normed = normed
        self.pooled = pooled

    def forward(
        self, ids: Tensor, clip_skip: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The hidden state, the pooled output, or both."""
        # Given here, because the model's own are a buffer, which has no values under fake tensors.
        positions = torch.arange(ids.shape[1])[None]
        output = self.text(
            ids, attention_mask=mask, position_ids=positions, output_hidden_states=self.layer is not None
        )
        pooled: Tensor = output.text_embeds if "text_embeds" in output else output.pooler_output
        if self.layer is None:
            return pooled.float()
        assert clip_skip is not None
        # All layers are there anyway: choosing one inside the graph makes clip skip an option of each request.
        states = torch.cat(output.hidden_states)
        hidden = states.index_select(0, states.shape[0] - self.layer - clip_skip)
        if self.normed:
            norm = self.text.get_submodule(_final_norm(self.text))
            # A layer kept in float32 records its state before the cast that goes on to the next layer.
            hidden = norm(hidden.to(next(norm.parameters()).dtype))
        return (hidden.float(), pooled.float()) if self.pooled else hidden.float()


def _final_norm(text: nn.Module) -> str:
    """Where the final layer norm lies, which differs between releases of transformers."""
    return str(next(name for name, _ in text.named_modules() if name.endswith("final_layer_norm")))


class T5TextEncoder(nn.Module):
    """Token ids [1, L] int64 -> last hidden state [1, L, E] float32."""

    def __init__(self, text: nn.Module) -> None:
        super().__init__()
        self.text = text

    def forward(self, ids: Tensor) -> Tensor:
        """The last hidden state."""
        hidden: Tensor = self.text(ids)[0]
        return hidden.float()
