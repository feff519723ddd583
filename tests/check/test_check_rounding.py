"""Every value in the recipe's type, as a device has it: what a CPU's engine does not show is found and named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTextModel

from tests.tiny import make_vae, recipe_for
from toolchain.bundle.bundle import read_bundle
from toolchain.check.components import _Comparison
from toolchain.check.measure import Feed, call
from toolchain.check.reference import reference_module
from toolchain.check.report import Entry
from toolchain.check.rounding import RoundedComponent
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.models.source import ModelSource
from toolchain.recipe import ComponentRecipe, Tolerance
from toolchain.signature import TensorSpec

TOLERANCE = Tolerance(cosine=0.999, snr_db=30, max_error=0.1)
WIDE = "decoder.mid_block.resnets.0"


@pytest.fixture
def loud(tiny_copy: Path) -> ModelSource:
    """A VAE whose first block reaches 4e4 and more inside, where a norm follows: in float32 it changes nothing."""
    torch.manual_seed(0)
    vae = make_vae(4)
    weight = vae.decoder.mid_block.resnets[0].conv1.weight.data
    weight *= 4e4 / weight.abs().max()
    vae.save_pretrained(tiny_copy / "vae")
    return resolve_model(str(tiny_copy))


def rounded(
    name: str, source: ModelSource, count: int = 1, tolerance: Tolerance = TOLERANCE, **own: object
) -> list[Entry]:
    component, recipe = MODELS["sd"].component(name), recipe_for(name, **own)
    spec = component.spec(source, recipe.buckets[0], recipe)
    random = np.random.default_rng(0)

    def draw(tensor: TensorSpec) -> np.ndarray:
        values = random.normal(size=tensor.shape)
        return (abs(values) if tensor.dtype.startswith("int") else values).astype(tensor.dtype)

    feeds = [Feed(str(i), {t.name: draw(t) for t in spec.inputs}) for i in range(count)]
    with reference_module(component, source, recipe) as module:
        references = [call(module, spec, feed.inputs) for feed in feeds]
        return RoundedComponent(component, source, recipe, module).compare("b", spec, feeds, references, tolerance)


def test_what_leaves_float16_fails_and_is_named(loud: ModelSource) -> None:
    (entry,) = rounded("vae_decoder", loud, dtype="float16")
    assert "finite" in entry.failed
    assert entry.note == f'components.vae_decoder.keep_float32 = ["{WIDE}"]'
    assert entry.note in entry.describe()
    assert entry.output == "image, every value in float16"
    (kept,) = rounded("vae_decoder", loud, dtype="float16", keep_float32=(WIDE,))
    assert kept.passed, kept.describe()


def test_a_residual_stream_that_overflows_takes_the_whole_component(tmp_path: Path, tiny_copy: Path) -> None:
    """What a block adds to is too large as well: to keep the block alone would help nothing."""
    torch.manual_seed(0)
    model = CLIPTextModel.from_pretrained(tiny_copy / "text_encoder")
    with torch.no_grad():
        for layer in model.text_model.encoder.layers if hasattr(model, "text_model") else model.encoder.layers:
            layer.mlp.fc2.weight.mul_(6e4 / layer.mlp.fc2.weight.abs().max())
    model.save_pretrained(tiny_copy / "text_encoder")
    source = resolve_model(str(tiny_copy))
    (entry, *_) = (e for e in rounded("text_encoder", source, dtype="float16") if "finite" in e.failed)
    assert entry.note == 'components.text_encoder.dtype = "float32"'


def test_bfloat16_has_the_range_of_float32(loud: ModelSource) -> None:
    (entry,) = rounded("vae_decoder", loud, dtype="bfloat16")
    assert entry.passed, entry.describe()
    (strict,) = rounded("vae_decoder", loud, tolerance=Tolerance(), dtype="bfloat16")
    assert "finite" not in strict.failed
    assert strict.note == "no value leaves the range of bfloat16: precision is lost, not range"


def test_a_value_that_no_module_gives_is_found_in_the_module_around_it(tiny_model: Path) -> None:
    """A square that a GEGLU or an attention has inside: 300 fits, its square does not."""

    class Squares(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (x * 300) ** 2 / 3e5

    component, recipe = MODELS["sd"].component("vae_decoder"), recipe_for("vae_decoder", dtype="float16")
    source = resolve_model(str(tiny_model))
    spec = component.spec(source, recipe.buckets[0], recipe)
    feed = Feed("f", {"latents": np.ones(spec.inputs[0].shape, np.float32)})
    with reference_module(component, source, recipe) as module:
        within = RoundedComponent(component, source, recipe, module)
        within._call(spec, feed.inputs)
        assert within._rounded is not None
        for owner in (module, within._rounded):
            owner.vae.decoder.conv_act = Squares()  # type: ignore[union-attr]
            owner.vae.decoder.conv_norm_out = torch.nn.Identity()  # type: ignore[union-attr]
            owner.vae.decoder.mid_block = torch.nn.Identity()  # type: ignore[union-attr]
            owner.vae.decoder.mid_block.forward = lambda x, *_: x  # type: ignore[union-attr]
        entries = within.compare("b", spec, [feed], [call(module, spec, feed.inputs)], TOLERANCE)
    assert [e.failed[-1] for e in entries] == ["finite"]
    assert entries[0].note == 'components.vae_decoder.keep_float32 = ["decoder.conv_act"]'


def test_some_of_the_inputs_are_computed_so(tiny_model: Path) -> None:
    entries = rounded("vae_encoder", resolve_model(str(tiny_model)), count=8, dtype="float16")
    assert [e.input for e in entries] == ["0", "4", "7"]
    assert all(e.passed and 30 < (e.metrics.snr_db or 0) < 110 for e in entries), [e.describe() for e in entries]


def test_a_check_fails_though_the_engine_does_not(tiny_bundle: Path, loud: ModelSource) -> None:
    """The engine computes in float32, as ONNX Runtime does for a float16 recipe on a CPU."""
    bundle = read_bundle(tiny_bundle)
    bucket = bundle.buckets[0]
    own = {"vae_decoder": ComponentRecipe("float16")}
    recipe = replace(bundle.recipe, buckets=(bucket,), components=own)
    latents = np.random.default_rng(0).normal(size=(1, 4, 8, 8)).astype(np.float32)
    comparison = _Comparison(replace(bundle, recipe=recipe), loud, MODELS["sd"], lambda text: None)
    comparison.decoder({bucket: [Feed("f", {"latents": latents})]})
    notes = {e.output: e.note for e in comparison.entries if e.note}
    assert notes == {"image, every value in float16": f'components.vae_decoder.keep_float32 = ["{WIDE}"]'}
    assert {e.output for e in comparison.entries} == {"pixels", "image", "image, every value in float16"}
