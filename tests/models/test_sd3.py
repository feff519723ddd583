"""Family sd3: its graphs have the signatures that it states, compute what diffusers does, and bad configs are named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from benchmarks.export_scale import PUBLISHED
from tests.tiny_sd3 import CHANNELS, LAYERS, POOLED, POSITIONS, T5_TOKENS, T5_WIDTH, WIDTHS, make_sd3, recipe_text
from toolchain.builder.plan import check_recipe
from toolchain.engines.builders import builder_of
from toolchain.errors import DiffbuildError, ModelError, RecipeError
from toolchain.export.capture import capture
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS, family_of
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Recipe, load_recipe, parse_recipe
from toolchain.sampler.layout import MAX_STATES, ROW
from toolchain.sampler.table import skipped_steps
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.safetensors import read_folder

FAMILY = MODELS["sd3"]
BUCKET = Bucket(2, 64, 96)
RECIPES = Path(__file__).parents[2] / "recipes"
T5 = "text_encoder_3"
GUIDED = parse_recipe(recipe_text(), "guided", "guided.toml")
PLAIN = parse_recipe(recipe_text(guided=False), "plain", "plain.toml")
NO_T5 = parse_recipe(recipe_text(t5=False), "no-t5", "no-t5.toml")
NO_T5_PLAIN = parse_recipe(recipe_text(t5=False, guided=False), "no-t5-plain", "no-t5-plain.toml")
CASES = [("3.5", GUIDED), ("3.5", PLAIN), ("3.5", NO_T5), ("3", NO_T5), ("3", NO_T5_PLAIN)]
ALL = pytest.mark.parametrize(("version", "recipe"), CASES, ids=lambda x: x if isinstance(x, str) else x.name)

Models = dict[str, ModelSource]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    folder = tmp_path_factory.mktemp("sd3")
    return {v: resolve_model(str(make_sd3(folder / v, version=v, t5=v == "3.5"))) for v in ("3", "3.5")}


@pytest.fixture(scope="module")
def source(models: Models) -> ModelSource:
    return models["3.5"]


@pytest.fixture(scope="module")
def pipeline(source: ModelSource) -> Any:
    from diffusers import StableDiffusion3Pipeline

    return StableDiffusion3Pipeline.from_pretrained(source.path, dtype=torch.float32)


def with_own(recipe: Recipe, name: str, **own: Any) -> Recipe:
    return replace(recipe, components={**recipe.components, name: replace(recipe.component(name), **own)})


def random_inputs(source: ModelSource, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Of the step: the next state's first entry is the guided output of the network, not scaled on its way in."""
    generator = torch.Generator().manual_seed(0)
    spec = FAMILY.component("denoiser").spec(source, BUCKET, recipe)
    inputs = {t.name: torch.randn(t.shape, generator=generator) for t in spec.inputs}
    row = torch.zeros(ROW)
    row[MAX_STATES**2] = 1.0
    row[-1] = 1.0
    return inputs | {
        "step": torch.tensor([3]),
        "timesteps": torch.linspace(999, 0, inputs["timesteps"].shape[0]),
        "table": row.expand(inputs["table"].shape).clone(),
        "guidance": torch.tensor([4.0]),
    }


def network_of(source: ModelSource, dtype: torch.dtype) -> Any:
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel.from_pretrained(source.path / "transformer", dtype=dtype).eval()


def output_of_diffusers(network: Any, inputs: dict[str, torch.Tensor], recipe: Recipe) -> torch.Tensor:
    """What StableDiffusion3Pipeline computes in one evaluation, its arithmetic written down again."""
    dtype = network.dtype
    clip = torch.cat([inputs["context"], inputs["context_2"]], dim=-1)
    t5 = inputs.get("context_3", torch.zeros(len(clip), 256, T5_WIDTH))
    clip = torch.nn.functional.pad(clip, (0, t5.shape[-1] - clip.shape[-1]))
    copies = 2 if recipe.classifier_free_guidance else 1
    latents = torch.cat([inputs["state"][0]] * copies)
    with torch.no_grad():
        output: torch.Tensor = network(
            hidden_states=latents.to(dtype),
            timestep=inputs["timesteps"][3].expand(len(latents)),
            encoder_hidden_states=torch.cat([clip, t5], dim=-2).to(dtype),
            pooled_projections=torch.cat([inputs["pooled"], inputs["pooled_2"]], dim=-1).to(dtype),
            return_dict=False,
        )[0].float()
    if copies == 1:
        return output
    negative, positive = output.chunk(2)
    return negative + 4.0 * (positive - negative)


def evaluate(source: ModelSource, recipe: Recipe, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        state, step = FAMILY.component("denoiser").reference(source, recipe)(**inputs)
    assert step.tolist() == [4]
    result: torch.Tensor = state[0]
    return result


# The step


@ALL
def test_the_step_is_diffusers_network_and_guidance(models: Models, version: str, recipe: Recipe) -> None:
    source = models[version]
    inputs = random_inputs(source, recipe)
    expected = output_of_diffusers(network_of(source, torch.float32), inputs, recipe)
    got = evaluate(source, recipe, inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_in_half_precision_it_is_the_network_that_diffusers_loads(source: ModelSource, dtype: Any) -> None:
    """To the last bit: positions are rounded as diffusers rounds them, the timestep stays in float32 as there."""
    recipe = with_own(PLAIN, "denoiser", dtype=dtype)
    network = network_of(source, getattr(torch, dtype))
    module = FAMILY.component("denoiser").module(source, recipe)
    module.transformer.load_state_dict(network.state_dict())  # type: ignore[union-attr, operator]
    inputs = random_inputs(source, recipe)
    with torch.no_grad():
        got = module(**inputs)[0][0]
    assert torch.equal(got, output_of_diffusers(network, inputs, recipe))


@pytest.mark.parametrize("name", ["context", "context_2", "context_3", "pooled", "pooled_2", "guidance"])
def test_every_condition_shows(source: ModelSource, name: str) -> None:
    inputs = random_inputs(source, GUIDED)
    before = evaluate(source, GUIDED, inputs)
    inputs[name] = inputs[name].roll(1, -1) if inputs[name].ndim > 1 else inputs[name] + 2
    after = evaluate(source, GUIDED, inputs)
    assert float((after - before).std() / before.std()) > 0.03


@pytest.fixture(scope="module")
def graphs(models: Models) -> dict[str, ir.Model]:
    denoiser = FAMILY.component("denoiser")
    return {
        "guided": capture(denoiser, models["3.5"], GUIDED, BUCKET),
        "no-t5-plain": capture(denoiser, models["3"], NO_T5_PLAIN, BUCKET),
    }


def test_signatures(graphs: dict[str, ir.Model]) -> None:
    names = ["state", "step", "timesteps", "table", "noise", "guidance", "context", "context_2", "pooled", "pooled_2"]
    for name, rows in (("guided", 4), ("no-t5-plain", 2)):
        inputs = graphs[name].graph.inputs
        assert [v.name for v in inputs] == names + ["context_3"] * (name == "guided")
        shapes = {v.name: tuple(v.shape or ()) for v in inputs}
        assert shapes["state"] == (MAX_STATES, 2, CHANNELS, 8, 12)
        assert shapes["context"] == (rows, 24, WIDTHS["text_encoder"])
        assert shapes["context_2"] == (rows, 24, WIDTHS["text_encoder_2"])
        assert shapes["pooled"] == (rows, POOLED["text_encoder"])
        assert shapes["pooled_2"] == (rows, POOLED["text_encoder_2"])
        assert shapes.get("context_3") == ((rows, T5_TOKENS, T5_WIDTH) if name == "guided" else None)


@pytest.mark.parametrize(("name", "version"), [("guided", "3.5"), ("no-t5-plain", "3")])
def test_every_weight_of_the_checkpoint_is_used(
    graphs: dict[str, ir.Model], models: Models, name: str, version: str
) -> None:
    uses = {u.key: u for u in weight_uses(graphs[name])}
    assert set(uses) == set(read_folder(models[version].path / "transformer"))
    # A buffer: by reference all the same, whole, and shared by every bucket.
    assert uses["pos_embed.pos_embed"].shape == (1, POSITIONS**2, 32)


@pytest.mark.parametrize(("name", "version"), [("guided", "3.5"), ("no-t5-plain", "3")])
def test_the_graph_computes_what_diffusers_does(
    graphs: dict[str, ir.Model], models: Models, tmp_path: Path, name: str, version: str
) -> None:
    source, recipe = models[version], GUIDED if name == "guided" else NO_T5_PLAIN
    inputs = random_inputs(source, recipe)
    got = run(graphs[name], source.path / "transformer", inputs, tmp_path)[0]
    expected = output_of_diffusers(network_of(source, torch.float32), inputs, recipe).numpy()
    np.testing.assert_allclose(got[0], expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


def run(graph: ir.Model, folder: Path, inputs: dict[str, torch.Tensor], out: Path) -> Any:
    """In ONNX Runtime, with the weights of the checkpoint."""
    graph = graph.clone()
    uses = weight_uses(graph)
    write_weights(uses, find_tensors(uses, read_folder(folder), folder), out / "w.safetensors")
    for name, tensor in load_file(out / "w.safetensors").items():
        graph.graph.initializers[name].const_value = ir.tensor(tensor.numpy(), name=name)
    ir.save(graph, out / "graph.onnx")
    session = onnxruntime.InferenceSession(out / "graph.onnx", providers=["CPUExecutionProvider"])
    return session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})


@pytest.mark.parametrize(
    ("dtype", "kept", "positions"),
    [("bfloat16", (), "BF16"), ("float16", ("norm_out", "proj_out"), "F16"), ("float16", ("pos_embed",), "F32")],
)
def test_lower_precisions(source: ModelSource, dtype: Any, kept: tuple[str, ...], positions: str) -> None:
    recipe = with_own(PLAIN, "denoiser", dtype=dtype, keep_float32=kept)
    uses = weight_uses(capture(FAMILY.component("denoiser"), source, recipe, BUCKET))
    low = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    wanted = {u.name: "F32" if u.name.startswith(kept) else low for u in uses}
    assert {u.name: u.dtype for u in uses} == wanted
    assert wanted["pos_embed.pos_embed"] == positions


@pytest.mark.parametrize("kept", [("*",), ("pos_embed", "norm_out", "proj_out"), ("transformer_blocks.*",)])
def test_modules_kept_in_float32(source: ModelSource, kept: tuple[str, ...]) -> None:
    module = FAMILY.component("denoiser").module(
        source, with_own(PLAIN, "denoiser", dtype="float16", keep_float32=kept)
    )
    reference = FAMILY.component("denoiser").reference(source, PLAIN)
    module.load_state_dict(reference.state_dict())
    inputs = random_inputs(source, PLAIN)
    with torch.no_grad():
        got, expected = module(**inputs)[0][0], reference(**inputs)[0][0]
    snr_db = 20 * torch.log10(expected.std() / (got - expected).std())
    assert snr_db > 50


# The other components


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("text_encoder", "float16"),
        ("text_encoder_2", "bfloat16"),
        (T5, "bfloat16"),
        ("vae_decoder", "float16"),
        ("vae_encoder", "bfloat16"),
    ],
)
def test_the_other_components_are_captured(source: ModelSource, name: str, dtype: Any) -> None:
    component = FAMILY.component(name)
    uses = weight_uses(capture(component, source, with_own(GUIDED, name, dtype=dtype), BUCKET))
    folder = source.path / component.folder
    assert find_tensors(uses, read_folder(folder), folder).keys() == {u.name for u in uses}


def test_text_encoders_give_the_denoisers_inputs(source: ModelSource) -> None:
    wanted = {t.name: t.shape for t in FAMILY.component("denoiser").spec(source, BUCKET, GUIDED).inputs}
    texts = [c for c in FAMILY.components if c.tokenizer]
    given = {t.name: t.shape for c in texts for t in c.spec(source, BUCKET, GUIDED).outputs}
    assert list(given) == ["context", "pooled", "context_2", "pooled_2", "context_3"]
    assert all(wanted[name][1:] == shape[1:] for name, shape in given.items())
    assert [c.name for c in FAMILY.parts(NO_T5)] == [c.name for c in FAMILY.components if c.name != T5]


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_text_encoders_and_their_join_are_the_pipelines(
    source: ModelSource, pipeline: Any, clip_skip: int, tmp_path: Path
) -> None:
    from toolchain.models.tokenizers import write_tokenizer
    from toolchain.runtime.prompt import PromptTokenizer

    prompts = ("a red circle on a white background", "a blue square", "left of a blue circle")
    context, _, pooled, _ = pipeline.encode_prompt(
        *prompts,
        do_classifier_free_guidance=False,
        clip_skip=clip_skip or None,
        max_sequence_length=T5_TOKENS,
    )
    got: dict[str, torch.Tensor] = {}
    for component, prompt in zip((c for c in FAMILY.components if c.tokenizer), prompts, strict=True):
        assert component.tokenizer is not None
        spec = component.spec(source, BUCKET, GUIDED)
        out = tmp_path / component.tokenizer
        cls = source.class_of(component.tokenizer)
        write_tokenizer(
            source.path / component.tokenizer,
            cls,
            spec.input("ids").shape[1],
            out,
            t5=component.name == T5,
            inversion=False,
        )
        inputs = {"ids": torch.from_numpy(PromptTokenizer(out).encode(prompt).ids)}
        if component.name != T5:
            inputs["clip_skip"] = torch.tensor([clip_skip])
        with torch.no_grad():
            outputs = component.reference(source, GUIDED)(**inputs)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        got |= dict(zip((t.name for t in spec.outputs), outputs, strict=True))
    module: Any = FAMILY.component("denoiser").reference(source, GUIDED)
    joined = module.join(got["context"], got["context_2"], got["context_3"])
    torch.testing.assert_close(joined, context, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(torch.cat([got["pooled"], got["pooled_2"]], dim=-1), pooled, rtol=1e-5, atol=1e-5)


def test_without_t5_the_join_is_the_pipelines(models: Models) -> None:
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(models["3"].path, text_encoder_3=None, tokenizer_3=None)
    expected = pipeline.encode_prompt("a red circle", None, None, do_classifier_free_guidance=False)[0]
    module: Any = FAMILY.component("denoiser").reference(models["3"], NO_T5)
    parts = [
        expected[:, :24, : WIDTHS["text_encoder"]],
        expected[:, :24, WIDTHS["text_encoder"] : sum(WIDTHS.values())],
    ]
    assert torch.equal(module.join(*parts, None), expected)


def test_prompts_of_another_length(source: ModelSource) -> None:
    """256 tokens where the recipe is silent; its own number reaches encoder and denoiser."""
    for tokens, expected in ((0, 256), (77, 77)):
        recipe = with_own(GUIDED, T5, tokens=tokens)
        assert FAMILY.component(T5).spec(source, BUCKET, recipe).input("ids").shape == (1, expected)
        step = FAMILY.component("denoiser").spec(source, BUCKET, recipe)
        assert step.input("context_3").shape == (4, expected, T5_WIDTH)


# Settings and checks


def test_settings(source: ModelSource, tmp_path: Path) -> None:
    settings = FAMILY.settings(source)
    assert (settings.vae_factor, settings.multiple, settings.token_pixels) == (8, 16, 16)
    assert settings.early_start
    assert not settings.linear_sigmas
    assert not settings.zero_negative
    assert not settings.embedded_guidance
    assert settings.max_clip_skip == min(LAYERS.values()) - 1
    assert settings.tokens(1024, 1024) == 0
    shifting = make_sd3(tmp_path / "model", dynamic=True)
    assert FAMILY.settings(resolve_model(str(shifting))).tokens(1024, 768) == 64 * 48


@pytest.mark.parametrize("strength", [0.1, 0.3, 0.33, 0.55, 0.6, 0.95, 1.0])
def test_image_to_image_starts_where_diffusers_does(source: ModelSource, strength: float) -> None:
    from types import SimpleNamespace

    from diffusers import StableDiffusion3Img2ImgPipeline

    pipeline: Any = SimpleNamespace(scheduler=SimpleNamespace(timesteps=np.arange(28), order=1))
    timesteps, left = StableDiffusion3Img2ImgPipeline.get_timesteps(pipeline, 28, strength, None)
    assert skipped_steps(28, strength, early_start=FAMILY.settings(source).early_start) == timesteps[0] == 28 - left


@ALL
def test_good_models_are_accepted(models: Models, version: str, recipe: Recipe) -> None:
    family_of(models[version], recipe)


def edit(folder: str, **changes: Any) -> Callable[[Path], None]:
    """Changes a config; None removes the setting."""

    def apply(model: Path) -> None:
        names = {"": "model_index.json", "tokenizer": "tokenizer/tokenizer_config.json"}
        path = model / names.get(folder, f"{folder}/config.json")
        config = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return apply


def remove(name: str) -> Callable[[Path], None]:
    return lambda model: (model / name).unlink()


BAD_MODELS: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (edit("", text_encoder=["transformers", "CLIPTextModel"]), ("the text_encoder is of an unsup", "WithProjection")),
    (edit("", text_encoder_2=[None, None]), ("the model has no text_encoder_2", "[null, null]")),
    (edit("", text_encoder_3=["transformers", "CLIPTextModel"]), ("text_encoder_3 is of an unsup", "T5EncoderModel")),
    (edit("", tokenizer_3=["transformers", "CLIPTokenizer"]), ("tokenizer_3 is of an unsupported class", "T5Tok")),
    (edit("", transformer=["diffusers", "FluxTransformer2DModel"]), ("transformer is of an unsup", "SD3Transformer")),
    (edit("transformer", joint_attention_dim=128), ("text_encoder_3's d_model does not fit", "= 96", "got: 128")),
    (edit("transformer", pooled_projection_dim=60), ("projection_dim together does not fit", "= 64", "got: 60")),
    (edit("transformer", caption_projection_dim=64), ("num_attention_heads times attention_head_dim", "= 32")),
    (edit("transformer", in_channels=33), ("takes other channels than the VAE's latents", "in_channels = 16")),
    (edit("transformer", out_channels=32), ("output has other channels", "out_channels = 16", "got: 32")),
    (edit("transformer", patch_size=0), ("patch_size is not a size", "got: 0")),
    (edit("transformer", pos_embed_max_size="8"), ("pos_embed_max_size is not a size", "got: '8'")),
    (edit("text_encoder", projection_dim=0), ("projection_dim is not a size", "got: 0")),
    (edit("text_encoder", num_hidden_layers=-1), ("num_hidden_layers is not a size", "got: -1")),
    (edit("text_encoder_2", max_position_embeddings=30), ("prompts of different lengths",)),
    (edit("tokenizer", model_max_length=23), ("tokenizer and the text encoder take prompts", "got: 23")),
    (edit("text_encoder_3", d_model=64), ("text_encoder_3's d_model does not fit", "= 64", "got: 96")),
    (edit("text_encoder_3", auto_map={"AutoModel": "x.Y"}), ("asks for code of its own", "auto_map")),
    (remove("tokenizer_3/tokenizer.json"), ("the tokenizer is incomplete", "tokenizer_3", "spiece.model")),
]


@pytest.mark.parametrize(("damage", "says"), BAD_MODELS, ids=lambda x: x[0] if isinstance(x, tuple) else "")
def test_what_is_refused(
    source: ModelSource, tmp_path: Path, damage: Callable[[Path], None], says: tuple[str, ...]
) -> None:
    model = Path(shutil.copytree(source.path, tmp_path / "model"))
    damage(model)
    refused(ModelError, model, GUIDED, says)


def refused(error: type[DiffbuildError], model: Path, recipe: Recipe, says: tuple[str, ...]) -> None:
    with pytest.raises(error) as caught:
        family_of(resolve_model(str(model)), recipe)
    assert all(words in str(caught.value) for words in says), str(caught.value)


def test_clip_encoders_wider_than_the_context(models: Models, tmp_path: Path) -> None:
    model = Path(shutil.copytree(models["3"].path, tmp_path / "model"))
    edit("transformer", joint_attention_dim=64)(model)
    refused(ModelError, model, NO_T5, ("wider than the transformer's context", "80 at least", "got: 64"))


BAD_RECIPES: list[tuple[str, Recipe, tuple[str, ...]]] = [
    ("3", GUIDED, ("no third text encoder", 'without = ["text_encoder_3"]', "guided: without", "[null, null]")),
    ("3.5", with_own(GUIDED, T5, tokens=513), ("not take prompts of this length", "at most 512", "got: 513")),
    ("3.5", with_own(GUIDED, T5, dtype="float16"), ("T5 overflows in float16", "components.text_encoder_3")),
    (
        "3.5",
        replace(GUIDED, buckets=(Bucket(1, 64, 64), Bucket(1, 64, 144))),
        ("cannot position-encode", "at most 128 pixels", "pos_embed_max_size = 8", "1x64x144"),
    ),
]


@pytest.mark.parametrize(("version", "recipe", "says"), BAD_RECIPES, ids=lambda x: x[0] if isinstance(x, tuple) else "")
def test_recipes_that_ask_too_much(models: Models, version: str, recipe: Recipe, says: tuple[str, ...]) -> None:
    refused(RecipeError, models[version].path, recipe, says)


def test_the_recipe_fits_the_published_model(tmp_path: Path) -> None:
    PUBLISHED["sd35-medium"].write(tmp_path)
    source, recipe = resolve_model(str(tmp_path)), load_recipe(RECIPES / "sd35-medium-fp16.toml")
    family = family_of(source, recipe)
    check_recipe(recipe, family, builder_of(recipe.backend), source)
    # T5 can be left out; its tables go with it.
    spared = {name: own for name, own in recipe.components.items() if name != T5}
    checks = {name: own for name, own in recipe.check.components.items() if name != T5}
    lean = replace(recipe, without=(T5,), components=spared, check=replace(recipe.check, components=checks))
    check_recipe(lean, family, builder_of(lean.backend), source)
