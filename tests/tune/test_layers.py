"""Which block a layer belongs to, in the names of the four families."""

from __future__ import annotations

import pytest

from toolchain.tune.layers import block_of


@pytest.mark.parametrize(
    ("module", "block"),
    [
        ("down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_out.0", "down_blocks.0.attentions.1"),
        ("down_blocks.1.downsamplers.0.conv", "down_blocks.1.downsamplers.0"),
        ("mid_block.resnets.0.conv1", "mid_block.resnets.0"),
        ("mid_block.attentions.0.transformer_blocks.0.ff.net.2", "mid_block.attentions.0"),
        ("mid_block.attentions.0.proj_in", "mid_block.attentions.0"),
        ("decoder.mid_block.attentions.0.to_out.0", "decoder.mid_block.attentions.0"),
        ("decoder.mid_block.attentions.0.to_q", "decoder.mid_block.attentions.0"),
        ("transformer_blocks.3.attn.to_out.0", "transformer_blocks.3"),
        ("transformer_blocks.12.ff.net.0.proj", "transformer_blocks.12"),
        ("single_transformer_blocks.7.proj_mlp", "single_transformer_blocks.7"),
        ("decoder.up_blocks.0.resnets.1.conv1", "decoder.up_blocks.0.resnets.1"),
        ("encoder.layers.5.mlp.fc1", "encoder.layers.5"),
        ("encoder.block.1.layer.0.SelfAttention.q", "encoder.block.1.layer.0"),
        ("proj_in", "proj_in"),
        ("decoder.conv_in", "decoder.conv_in"),
    ],
)
def test_blocks(module: str, block: str) -> None:
    assert block_of(module) == block
