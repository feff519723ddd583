"""Modules kept in float32 inside a half-precision network: every choice of them runs, and computes the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutput

from tests.tiny import recipe_for
from toolchain.errors import RecipeError
from toolchain.export.capture import capture
from toolchain.models.construct import construct
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe

BUCKET = Bucket(1, 64, 64)
UNET = [
    ("down_blocks.0",),
    ("down_blocks.*",),
    ("up_blocks",),
    ("*",),
    ("mid_block", "*.norm1"),
    ("mid_block.*", "mid_block"),
]
CASES = [
    *(("denoiser", kept) for kept in UNET),
    *(("text_encoder", kept) for kept in [("*",), ("encoder",), ("encoder.layers.0", "*.mlp")]),
    *(("vae_decoder", kept) for kept in [("*",), ("decoder.mid_block",), ("decoder.up_blocks.*",)]),
]


def run(source: ModelSource, name: str, recipe: Recipe) -> list[torch.Tensor]:
    component = MODELS["sd"].component(name)
    module = component.module(source, recipe)
    module.load_state_dict(component.reference(source, recipe).state_dict(), strict=False)
    generator = torch.Generator().manual_seed(0)
    inputs = {
        t.name: torch.zeros(t.shape, dtype=torch.int64)
        if t.dtype == "int64"
        else torch.rand(t.shape, generator=generator)
        for t in component.spec(source, BUCKET, recipe).inputs
    }
    with torch.no_grad():
        outputs = module(**inputs)
    return [outputs] if isinstance(outputs, torch.Tensor) else list(outputs)


@pytest.mark.parametrize(("name", "kept"), CASES)
def test_modules_kept_in_float32(tiny_model: Path, name: str, kept: tuple[str, ...]) -> None:
    source = resolve_model(str(tiny_model))
    got = run(source, name, recipe_for(name, dtype="float16", keep_float32=kept))
    expected = run(source, name, recipe_for())
    for a, b in zip(got, expected, strict=True):
        assert a.dtype == b.dtype
        if a.dtype == torch.float32:
            assert torch.isfinite(a).all()
            torch.testing.assert_close(a, b, rtol=0.02, atol=0.02 * float(b.abs().max()))


def test_one_pair_of_casts_around_nested_matches(tiny_model: Path) -> None:
    recipe = recipe_for("denoiser", dtype="float16", keep_float32=("mid_block", "*.norm1"))
    step = MODELS["sd"].component("denoiser").module(resolve_model(str(tiny_model)), recipe)
    hooked = {n for n, m in step.unet.named_modules() if m._forward_pre_hooks}  # type: ignore[union-attr]
    assert "mid_block" in hooked
    assert not any(name.startswith("mid_block.") for name in hooked)
    assert any(name.endswith(".norm1") for name in hooked)


@pytest.mark.parametrize("kept", [("down_blocks.*",), ("mid_block", "*.norm1")])
def test_they_are_captured(tiny_model: Path, kept: tuple[str, ...]) -> None:
    source = resolve_model(str(tiny_model))
    recipe = recipe_for("denoiser", dtype="float16", keep_float32=kept)
    capture(MODELS["sd"].component("denoiser"), source, recipe, BUCKET)


class Inner(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(2, 2)

    def forward(self, pair: tuple[torch.Tensor, torch.Tensor], named: dict[str, torch.Tensor]) -> BaseModelOutput:
        assert {t.dtype for t in (*pair, *named.values())} == {torch.float32}
        return BaseModelOutput(self.linear(pair[0]), (pair[1], named["x"]))


def test_casts_reach_into_structures() -> None:
    class Outer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

    x = torch.zeros(1, 2, dtype=torch.float16)
    output = construct(Outer, "float16", ["inner"], "c").inner((x, x), named={"x": x})  # type: ignore[operator]
    assert isinstance(output, BaseModelOutput)
    assert output.last_hidden_state is not None
    assert output.hidden_states is not None
    assert {t.dtype for t in (output.last_hidden_state, *output.hidden_states)} == {torch.float16}
    with pytest.raises(RecipeError, match="matches no module"):
        construct(Outer, "float16", ["inner", "inner.conv"], "c")
