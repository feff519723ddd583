"""FLUX.1: the step graph is diffusers' network with its arithmetic, and foreign models are refused by their configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch

from tests.pretend import pretended
from tests.tiny_flux import T5_TOKENS, make_flux, recipe_text
from toolchain.errors import ModelError, RecipeError
from toolchain.export.capture import capture
from toolchain.graph.placeholder import is_weight
from toolchain.models.flux_step import pack, rotary_tables, unpack
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS, family_of
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, ComponentRecipe, Recipe, load_recipe, parse_recipe
from toolchain.sampler.layout import MAX_EVALUATIONS, MAX_STATES, ROW
from toolchain.sampler.table import skipped_steps, split, step_reference
from toolchain.weights.derived import find_tensors, weight_uses
from toolchain.weights.safetensors import read_folder

BUCKET = Bucket(2, 64, 96)
TOKENS = 4 * 6
FLUX = MODELS["flux"]
RECIPES = Path(__file__).parents[2] / "recipes"
GUIDED = parse_recipe(recipe_text(guided=True, bucket="2x64x96"), "guided", "guided.toml")
PLAIN = parse_recipe(recipe_text(guided=False, bucket="2x64x96"), "plain", "plain.toml")


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    return resolve_model(str(make_flux(tmp_path_factory.mktemp("flux") / "dev")))


@pytest.fixture(scope="module")
def schnell(tmp_path_factory: pytest.TempPathFactory) -> ModelSource:
    """Without an input for guidance, and with the published models' eos_token_id, which is not the tokenizer's."""
    folder = tmp_path_factory.mktemp("flux") / "schnell"
    return resolve_model(str(make_flux(folder, guidance_embeds=False, eos_token_id=2)))


@pytest.fixture
def either(request: pytest.FixtureRequest) -> ModelSource:
    source: ModelSource = request.getfixturevalue(request.param)
    return source


both_models = pytest.mark.parametrize("either", ["dev", "schnell"], indirect=True)
both_recipes = pytest.mark.parametrize("recipe", [GUIDED, PLAIN], ids=lambda r: r.name)


def in_dtype(recipe: Recipe, dtype: Any, keep_float32: tuple[str, ...] = ()) -> Recipe:
    own = replace(recipe.component("denoiser"), dtype=dtype, keep_float32=keep_float32)
    return replace(recipe, components={**recipe.components, "denoiser": own})


def random_inputs(source: ModelSource, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Inputs of the step at index 3 of a schedule, each of a size that it has in use."""
    generator = torch.Generator().manual_seed(1)
    spec = FLUX.component("denoiser").spec(source, BUCKET, recipe)
    inputs = {t.name: torch.randn(t.shape, generator=generator) for t in spec.inputs}
    inputs["step"] = torch.tensor([3])
    inputs["timesteps"] = torch.linspace(1000, 1, MAX_EVALUATIONS)
    inputs["guidance"] = torch.tensor([3.5])
    if "true_cfg" in inputs:
        inputs["true_cfg"] = torch.tensor([2.5])
    return inputs


def diffusers_output(
    network: Any, latents: torch.Tensor, inputs: dict[str, torch.Tensor], rows: slice, dtype: torch.dtype
) -> torch.Tensor:
    """What FluxPipeline computes in one evaluation for packed `latents` and those `rows` of the conditions."""
    from diffusers import FluxPipeline

    height, width = inputs["state"].shape[-2:]
    time = inputs["timesteps"][3].expand(len(latents)).to(dtype)
    ids = FluxPipeline._prepare_latent_image_ids(1, height // 2, width // 2, None, dtype)
    guidance = inputs["guidance"].expand(len(latents)) if network.config.guidance_embeds else None
    output: torch.Tensor = network(
        hidden_states=latents,
        timestep=time / 1000,
        guidance=guidance,
        pooled_projections=inputs["pooled"][rows].to(dtype),
        encoder_hidden_states=inputs["context"][rows].to(dtype),
        txt_ids=torch.zeros(T5_TOKENS, 3, dtype=dtype),
        img_ids=ids,
        return_dict=False,
    )[0]
    return output


def step_of_diffusers(
    network: Any, inputs: dict[str, torch.Tensor], recipe: Recipe, dtype: torch.dtype
) -> torch.Tensor:
    """The next state, from diffusers' own packing and network and the table's arithmetic in numpy."""
    from diffusers import FluxPipeline

    row = inputs["table"][3]
    sample = inputs["state"][0] * float(split(row.numpy())[3])
    batch, channels, height, width = sample.shape
    latents = FluxPipeline._pack_latents(sample, batch, channels, height, width).to(dtype)
    output = diffusers_output(network, latents, inputs, slice(-batch, None), dtype).float()
    if recipe.classifier_free_guidance:
        negative = diffusers_output(network, latents, inputs, slice(0, batch), dtype).float()
        output = negative + inputs["true_cfg"] * (output - negative)
    parts = (FluxPipeline._unpack_latents(x, height * 8, width * 8, 8) for x in (output, inputs["noise"]))
    unpacked, noise = (part.numpy() for part in parts)
    return torch.from_numpy(step_reference(row.numpy(), inputs["state"].numpy(), unpacked, noise))


def load_network(source: ModelSource, dtype: torch.dtype) -> Any:
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(source.path / "transformer", dtype=dtype).eval()


@both_models
@both_recipes
def test_the_step_is_diffusers_network_and_arithmetic(either: ModelSource, recipe: Recipe) -> None:
    inputs = random_inputs(either, recipe)
    with torch.no_grad():
        state, step = FLUX.component("denoiser").reference(either, recipe)(**inputs)
        expected = step_of_diffusers(load_network(either, torch.float32), inputs, recipe, torch.float32)
    assert step.tolist() == [4]
    torch.testing.assert_close(state, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@both_models
def test_in_bfloat16_time_and_guidance_are_rounded_as_in_diffusers(either: ModelSource) -> None:
    """Before the division by 1000 and again after: at 12 steps of 1024, bfloat16 has one value for four timesteps."""
    recipe = in_dtype(PLAIN, "bfloat16")
    network = load_network(either, torch.bfloat16)
    inputs = random_inputs(either, recipe)
    module = FLUX.component("denoiser").module(either, recipe)
    module.transformer.load_state_dict(network.state_dict())  # type: ignore[union-attr, operator]
    with torch.no_grad():
        state, _ = module(**inputs)
        expected = step_of_diffusers(network, inputs, recipe, torch.bfloat16)
    torch.testing.assert_close(state, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "least"), [("context", 0.05), ("pooled", 0.05), ("guidance", 0.01), ("true_cfg", 0.05), ("noise", 0.05)]
)
def test_every_condition_shows(dev: ModelSource, name: str, least: float) -> None:
    inputs = random_inputs(dev, GUIDED)
    module = FLUX.component("denoiser").reference(dev, GUIDED)
    with torch.no_grad():
        before = module(**inputs)[0]
        inputs[name] = inputs[name].roll(1, -1) if inputs[name].ndim > 1 else inputs[name] + 2
        after = module(**inputs)[0]
    assert float((after - before).std() / before.std()) > least


def test_schnell_ignores_guidance(schnell: ModelSource) -> None:
    inputs = random_inputs(schnell, PLAIN)
    module = FLUX.component("denoiser").reference(schnell, PLAIN)
    with torch.no_grad():
        before = module(**inputs)[0]
        assert torch.equal(before, module(**{**inputs, "guidance": torch.tensor([7.0])})[0])


@pytest.mark.parametrize(("text", "height", "width"), [(20, 4, 6), (512, 64, 64), (256, 84, 48)])
def test_positions_are_those_of_diffusers(text: int, height: int, width: int) -> None:
    from diffusers import FluxPipeline
    from diffusers.models.transformers.transformer_flux import FluxPosEmbed

    axes = [16, 56, 56]
    image = FluxPipeline._prepare_latent_image_ids(1, height, width, None, torch.float32)
    expected = FluxPosEmbed(10000, axes)(torch.cat([torch.zeros(text, 3), image]))
    for ours, theirs in zip(rotary_tables(axes, 10000.0, text, height, width), expected, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-7)


def test_packing_is_that_of_diffusers() -> None:
    from diffusers import FluxPipeline

    latents = torch.randn(2, 16, 8, 12)
    packed = FluxPipeline._pack_latents(latents, 2, 16, 8, 12)
    assert torch.equal(pack(latents), packed)
    assert torch.equal(unpack(packed, 8, 12), latents)


@pytest.mark.parametrize(
    ("either", "recipe"),
    [
        ("dev", GUIDED),
        ("dev", in_dtype(PLAIN, "bfloat16", ("transformer_blocks.*", "time_text_embed"))),
        ("schnell", in_dtype(GUIDED, "bfloat16")),
        ("schnell", in_dtype(PLAIN, "float16")),
    ],
    indirect=["either"],
    ids=["dev-guided-fp32", "dev-plain-bf16", "schnell-guided-bf16", "schnell-plain-fp16"],
)
def test_the_step_is_captured_with_its_positions_as_constants(either: ModelSource, recipe: Recipe) -> None:
    model = capture(FLUX.component("denoiser"), either, recipe, BUCKET)
    rows = BUCKET.batch * (2 if recipe.classifier_free_guidance else 1)
    names = ["state", "step", "timesteps", "table", "noise", "guidance", "context", "pooled"]
    shapes: dict[str, tuple[int, ...]] = {
        "state": (MAX_STATES, 2, 16, 8, 12),
        "table": (MAX_EVALUATIONS, ROW),
        "noise": (2, TOKENS, 64),
        "context": (rows, T5_TOKENS, 48),
        "pooled": (rows, 32),
    }
    inputs = {str(v.name): tuple(v.shape or ()) for v in model.graph.inputs}
    assert list(inputs) == names + ["true_cfg"] * recipe.classifier_free_guidance
    assert {name: inputs[name] for name in shapes} == shapes
    assert {w.key for w in weight_uses(model)} == set(read_folder(either.path / "transformer"))
    assert_no_positions_are_computed(model.graph, rows, 2 if FLUX.settings(either).embedded_guidance else 1)


def assert_no_positions_are_computed(graph: ir.Graph, rows: int, embedded: int) -> None:
    """Waves only of the `embedded` numbers, nothing in float64, each table once."""
    waves = [n for n in graph if n.op_type in ("Sin", "Cos")]
    assert [tuple(n.outputs[0].shape or ()) for n in waves] == [(rows, 128)] * 2 * embedded
    assert not [v for n in graph for v in n.outputs if v.dtype == ir.DataType.DOUBLE]
    tables = rotary_tables((4, 6, 6), 10000.0, T5_TOKENS, 4, 6)
    constants = [v.const_value for v in graph.initializers.values() if not is_weight(v)]
    found = [c.numpy().tobytes() for c in constants if c is not None and c.size == tables[0].numel()]
    assert sorted(found) == sorted(t.numpy().tobytes() for t in tables)


@pytest.mark.parametrize("name", [c.name for c in FLUX.components if c.name != "denoiser"])
def test_the_other_components_are_captured_in_bfloat16(dev: ModelSource, name: str) -> None:
    own = replace(PLAIN.component(name), dtype="bfloat16")
    recipe = replace(PLAIN, components={**PLAIN.components, name: own})
    component = FLUX.component(name)
    uses = weight_uses(capture(component, dev, recipe, BUCKET))
    folder = dev.path / component.folder
    assert {use.dtype for use in uses} == {"BF16"}
    assert find_tensors(uses, read_folder(folder), folder).keys() == {use.name for use in uses}


@pytest.mark.parametrize("kept", [("norm_out", "proj_out"), ("transformer_blocks.*", "time_text_embed"), ("*",)])
def test_modules_kept_in_float32(dev: ModelSource, kept: tuple[str, ...]) -> None:
    recipe = in_dtype(PLAIN, "bfloat16", kept)
    inputs = random_inputs(dev, PLAIN)
    # Numbers that bfloat16 holds exactly: what rounding does to others is the network's own way, and no small thing.
    inputs["timesteps"][:], inputs["guidance"][:] = 1000, 4
    module = FLUX.component("denoiser").module(dev, recipe)
    reference = FLUX.component("denoiser").reference(dev, PLAIN)
    module.load_state_dict(reference.state_dict())
    with torch.no_grad():
        (state, _), (expected, _) = module(**inputs), reference(**inputs)
    snr_db = 20 * torch.log10(expected.std() / (state - expected).std())
    assert snr_db > (40 if kept == ("*",) else 30)


@both_models
def test_text_encoders_give_what_the_pipeline_computes(either: ModelSource) -> None:
    from diffusers import FluxPipeline

    from toolchain.models.tokenizers import write_tokenizer
    from toolchain.runtime.prompt import PromptTokenizer

    pipeline = FluxPipeline.from_pretrained(either.path)
    prompts = ("a red circle on a white background", "a blue square left of a red circle")
    context, pooled, _ = pipeline.encode_prompt(prompts[0], prompts[1], max_sequence_length=T5_TOKENS)
    for name, prompt, expected in (("text_encoder", prompts[0], pooled), ("text_encoder_2", prompts[1], context)):
        component = FLUX.component(name)
        assert component.tokenizer is not None
        length = component.spec(either, BUCKET, PLAIN).input("ids").shape[1]
        out = either.path / "written" / component.tokenizer
        cls, t5 = either.class_of(component.tokenizer), name == "text_encoder_2"
        write_tokenizer(either.path / component.tokenizer, cls, length, out, t5=t5, inversion=True)
        tokenizer, module = PromptTokenizer(out), component.reference(either, PLAIN)
        with torch.no_grad():
            ours, other = (module(torch.from_numpy(tokenizer.encode(text).ids)) for text in (prompt, "a"))
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)
        assert float((ours - other).std() / ours.std()) > 0.1


def test_prompts_of_another_length(dev: ModelSource) -> None:
    """512 tokens where the recipe is silent; its own number reaches encoder and denoiser."""
    for tokens, expected in ((0, 512), (256, 256)):
        recipe = replace(PLAIN, components={"text_encoder_2": ComponentRecipe(tokens=tokens)})
        t5 = FLUX.component("text_encoder_2").spec(dev, BUCKET, recipe)
        step = FLUX.component("denoiser").spec(dev, BUCKET, recipe)
        assert t5.input("ids").shape == (1, expected)
        assert t5.outputs[0].shape == (1, expected, 48)
        assert step.input("context").shape == (2, expected, 48)


def test_settings(dev: ModelSource, schnell: ModelSource) -> None:
    settings = FLUX.settings(dev)
    assert (settings.vae_factor, settings.multiple, settings.token_pixels) == (8, 16, 16)
    assert settings.linear_sigmas
    assert settings.early_start
    assert settings.max_clip_skip == 0
    assert settings.embedded_guidance
    assert not FLUX.settings(schnell).embedded_guidance
    assert settings.tokens(1024, 1024) == 4096
    assert FLUX.settings(schnell).tokens(1024, 1024) == 0


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.33, 0.55, 0.6, 0.95, 1.0])
def test_image_to_image_starts_where_diffusers_does(dev: ModelSource, strength: float) -> None:
    from types import SimpleNamespace

    from diffusers import FluxImg2ImgPipeline

    scheduler = SimpleNamespace(timesteps=np.arange(28), order=1)
    pipeline: Any = SimpleNamespace(scheduler=scheduler)
    timesteps, left = FluxImg2ImgPipeline.get_timesteps(pipeline, 28, strength, None)
    assert skipped_steps(28, strength, early_start=FLUX.settings(dev).early_start) == timesteps[0] == 28 - left


def test_the_published_configs_are_accepted(dev: ModelSource) -> None:
    family_of(dev, PLAIN)
    family_of(dev, GUIDED)


def edit(folder: str, **changes: Any) -> Callable[[Path], None]:
    """Changes a config; None removes the setting."""

    def apply(model: Path) -> None:
        path = model / folder / "config.json" if folder else model / "model_index.json"
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


def pad_on_the_left(folder: Path) -> None:
    (folder / "tokenizer_2" / "tokenizer_config.json").write_text('{"padding_side": "left"}')


BAD_MODELS: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (edit("", text_encoder_2=[None, None]), ("the model has no text_encoder_2", "[null, null]")),
    (edit("", text_encoder_2=["transformers", "CLIPTextModel"]), ("text_encoder_2 is of an unsupported class", "T5")),
    (edit("", text_encoder=["transformers", "CLIPTextModelWithProjection"]), ("the text_encoder is of an unsupp",)),
    (edit("", tokenizer_2=["transformers", "CLIPTokenizer"]), ("tokenizer_2 is of an unsupported class", "T5Tok")),
    (pad_on_the_left, ("unsupported padding_side", "tokenizer_2")),
    (edit("", transformer=["diffusers", "SD3Transformer2DModel"]), ("transformer is of an unsupported class",)),
    (edit("", _class_name="FluxFillPipeline"), ("FluxFillPipeline is not supported", "FluxPipeline")),
    (edit("", _class_name="FluxControlPipeline"), ("FluxControlPipeline is not supported",)),
    (edit("", _class_name="FluxKontextPipeline"), ("FluxKontextPipeline is not supported",)),
    (edit("transformer", in_channels=384), ("inpainting and instruction", "in_channels = 64", "384")),
    (edit("transformer", in_channels=128), ("inpainting and instruction", "in_channels = 64", "128")),
    (edit("transformer", out_channels=32), ("other tokens than its input", "out_channels = 64", "32")),
    (edit("transformer", patch_size=2), ("other tokens than its input", "patch_size = 1", "2")),
    (edit("transformer", joint_attention_dim=4096), ("does not fit", "joint_attention_dim = 48", "d_model", "4096")),
    (edit("transformer", pooled_projection_dim=768), ("does not fit", "pooled_projection_dim = 32", "768")),
    (edit("transformer", axes_dims_rope=[4, 6, 8]), ("add up to its head size", "attention_head_dim = 16", "18")),
    (edit("transformer", axes_dims_rope=None), ("do not add up to its head size", "attention_head_dim = 16", "128")),
    (edit("transformer", axes_dims_rope=[8, 8]), ("axes_dims_rope is not a list of sizes", "three even numbers")),
    (edit("transformer", axes_dims_rope=[4, 5, 7]), ("axes_dims_rope is not a list of sizes", "[4, 5, 7]")),
    (edit("transformer", in_channels=None), ("lacks a setting", "in_channels")),
    (edit("text_encoder_2", d_model=None), ("lacks a setting", "d_model")),
    (edit("text_encoder_2", d_model="wide"), ("d_model is not a size", "'wide'")),
    (edit("text_encoder_2", auto_map={"AutoModel": "x.Y"}), ("asks for code of its own", "auto_map")),
    (edit("vae", latent_channels=0), ("latent_channels is not a size",)),
    (lambda model: (model / "tokenizer_2" / "tokenizer.json").unlink(), ("tokenizer is incomplete", "spiece.model")),
]


@pytest.mark.parametrize(("damage", "messages"), BAD_MODELS)
def test_models_that_are_refused(
    dev: ModelSource, tmp_path: Path, damage: Callable[[Path], None], messages: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(dev.path, tmp_path / "model"))
    damage(model)
    with pytest.raises(ModelError) as error:
        family_of(resolve_model(str(model)), PLAIN)
    assert all(message in str(error.value) for message in messages)


def test_a_recipe_that_asks_for_too_long_prompts(dev: ModelSource) -> None:
    recipe = replace(PLAIN, components={"text_encoder_2": ComponentRecipe(tokens=513)})
    with pytest.raises(RecipeError, match="at most 512") as error:
        family_of(dev, recipe)
    assert "components.text_encoder_2.tokens" in str(error.value)


@pytest.mark.parametrize("name", ["flux1-dev-bf16", "flux1-schnell-bf16"])
def test_shipped_recipes_fit_and_are_planned(dev: ModelSource, tmp_path: Path, name: str) -> None:
    from toolchain.builder.plan import make_plan
    from toolchain.store.artifacts import Store

    recipe = load_recipe(RECIPES / f"{name}.toml")
    plan = make_plan(recipe, dev, Store(tmp_path), graphs_only=True)
    per_bucket = sum(c.per_bucket for c in FLUX.components)
    assert len(plan.steps) == 2 + per_bucket * len(recipe.buckets)
    with pretended():
        whole = make_plan(recipe, dev, Store(tmp_path))
    assert len(whole.steps) > len(plan.steps)
