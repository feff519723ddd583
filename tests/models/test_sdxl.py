"""Family sdxl: graphs have their stated signatures and compute what diffusers does; bad configs are named."""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.export_scale import PUBLISHED
from tests.tiny_sdxl import LAYERS, POOLED, TIME_EMBEDDING, WIDTHS, make_sdxl
from toolchain.errors import DiffbuildError, ModelError, RecipeError
from toolchain.export.capture import capture
from toolchain.graph.placeholder import is_weight
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS, family_of
from toolchain.models.source import ModelSource
from toolchain.recipe import Bucket, Check, ComponentRecipe, Recipe, load_recipe
from toolchain.sampler.layout import MAX_STATES, ROW

ROOT = Path(__file__).parents[2]
FAMILY = MODELS["sdxl"]
BUCKET = Bucket(2, 64, 96)
PROMPTS = ("a red circle on a white background", "a blue square")
ONNX_NAMES = {"float32": "FLOAT", "float16": "FLOAT16", "bfloat16": "BFLOAT16"}
RECIPE = Recipe(name="tiny", family="sdxl", buckets=(BUCKET,), check=Check(("a red circle",)))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_sdxl(tmp_path_factory.mktemp("models") / "sdxl")


@pytest.fixture(scope="module")
def source(model: Path) -> ModelSource:
    return resolve_model(str(model))


@functools.cache
def diffusers_pipeline(model: Path) -> Any:
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(model, dtype=torch.float32)


def in_dtype(dtype: str, *names: str) -> Recipe:
    return replace(RECIPE, components={name: ComponentRecipe(dtype) for name in names})  # type: ignore[arg-type]


def random_inputs(source: ModelSource, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Of the step: the next state's first entry is the guided output of the network, not scaled on its way in."""
    torch.manual_seed(0)
    spec = FAMILY.component("denoiser").spec(source, BUCKET, recipe)
    inputs = {t.name: torch.randn(t.shape) for t in spec.inputs if t.name != "step"}
    row = torch.zeros(ROW)
    row[MAX_STATES**2] = 1.0
    row[-1] = 1.0
    sizes = torch.tensor([[64.0, 96, 0, 0, 64, 96], [128, 64, 16, 8, 64, 96]])
    return inputs | {
        "step": torch.tensor([3]),
        "timesteps": torch.linspace(999, 0, inputs["timesteps"].shape[0]),
        "table": row.expand(inputs["table"].shape).clone(),
        "guidance": torch.tensor([4.0]),
        "guidance_rescale": torch.tensor([0.3]),
        "time_ids": sizes.repeat(inputs["time_ids"].shape[0] // 2, 1),
    }


def evaluate(source: ModelSource, recipe: Recipe, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    module = FAMILY.component("denoiser").reference(source, recipe)
    with torch.no_grad():
        state, step = module(**inputs)
    assert step.tolist() == [4]
    result: torch.Tensor = state[0]
    return result


# Graphs


@pytest.fixture(scope="module")
def step_graph(source: ModelSource) -> Any:
    """The guided step in float32. Capturing compares it with its signature."""
    return capture(FAMILY.component("denoiser"), source, RECIPE, BUCKET)


@pytest.mark.parametrize("guided", [True, False])
def test_the_signature_of_the_step(source: ModelSource, guided: bool) -> None:
    recipe = replace(RECIPE, classifier_free_guidance=guided)
    shapes = {t.name: t.shape for t in FAMILY.component("denoiser").spec(source, BUCKET, recipe).inputs}
    rows = 4 if guided else 2
    assert list(shapes)[-5:] == ["guidance_rescale", "context", "context_2", "pooled", "time_ids"]
    assert shapes["context"] == (rows, 24, WIDTHS["text_encoder"])
    assert shapes["context_2"] == (rows, 24, WIDTHS["text_encoder_2"])
    assert shapes["pooled"] == (rows, POOLED)
    assert shapes["time_ids"] == (rows, 6)


@pytest.mark.parametrize(
    ("dtype", "name", "guided"),
    [
        ("float16", "denoiser", False),
        ("bfloat16", "denoiser", True),
        ("float16", "text_encoder", True),
        ("bfloat16", "vae_decoder", True),
        ("float32", "vae_encoder", True),
    ],
)
def test_graphs_have_their_signature_and_precision(source: ModelSource, dtype: str, name: str, guided: bool) -> None:
    recipe = replace(in_dtype(dtype, name), classifier_free_guidance=guided)
    assert weight_dtypes(capture(FAMILY.component(name), source, recipe, BUCKET)) == {ONNX_NAMES[dtype]}


def weight_dtypes(graph: Any) -> set[str]:
    return {str(v.dtype) for v in graph.graph.initializers.values() if is_weight(v)}


def test_the_recipe_decides_the_precision_not_the_config(model: Path, tmp_path: Path) -> None:
    """SDXL's configs say float16, and what a test saves says float32."""
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    change("text_encoder_2/config.json", dtype=None, torch_dtype="float16")(folder)
    module = FAMILY.component("text_encoder_2").module(resolve_model(str(folder)), RECIPE)
    assert {p.dtype for p in module.parameters()} == {torch.float32}


def test_text_encoders_give_the_denoisers_inputs(source: ModelSource) -> None:
    wanted = {t.name: t.shape for t in FAMILY.component("denoiser").spec(source, BUCKET, RECIPE).inputs}
    given = {
        t.name: t.shape
        for name in ("text_encoder", "text_encoder_2")
        for t in FAMILY.component(name).spec(source, BUCKET, RECIPE).outputs
    }
    assert list(given) == ["context", "context_2", "pooled"]
    assert all(wanted[name][1:] == shape[1:] for name, shape in given.items())


# What they compute


def test_the_guided_step_is_the_unet_and_diffusers_guidance(source: ModelSource, model: Path) -> None:
    from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import rescale_noise_cfg

    inputs = random_inputs(source, RECIPE)
    with torch.no_grad():
        output = diffusers_pipeline(model).unet(
            torch.cat([inputs["state"][0]] * 2),
            inputs["timesteps"][3],
            encoder_hidden_states=torch.cat([inputs["context"], inputs["context_2"]], dim=-1),
            added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
            return_dict=False,
        )[0]
    negative, positive = output.chunk(2)
    expected = rescale_noise_cfg(negative + 4.0 * (positive - negative), positive, guidance_rescale=0.3)
    torch.testing.assert_close(evaluate(source, RECIPE, inputs), expected, rtol=1e-4, atol=1e-5)


def test_the_step_without_guidance_is_the_unet(source: ModelSource, model: Path) -> None:
    recipe = replace(RECIPE, classifier_free_guidance=False)
    inputs = random_inputs(source, recipe)
    with torch.no_grad():
        expected = diffusers_pipeline(model).unet(
            inputs["state"][0],
            inputs["timesteps"][3],
            encoder_hidden_states=torch.cat([inputs["context"], inputs["context_2"]], dim=-1),
            added_cond_kwargs={"text_embeds": inputs["pooled"], "time_ids": inputs["time_ids"]},
            return_dict=False,
        )[0]
    torch.testing.assert_close(evaluate(source, recipe, inputs), expected, rtol=1e-4, atol=1e-5)


def test_sizes_are_exact_beyond_2048_pixels(source: ModelSource) -> None:
    """Joined to the pooled prompt in float32, and rounded to float16 together with it: 2049 in float16 is 2048."""
    graph = capture(FAMILY.component("denoiser"), source, in_dtype("float16", "denoiser"), BUCKET).graph
    (time_ids,) = (value for value in graph.inputs if value.name == "time_ids")
    reached, joined = {time_ids}, None
    for node in graph:
        if joined is None and reached & set(node.inputs):
            reached |= set(node.outputs)
            if node.op_type == "Concat" and len({v.shape[-1] for v in node.inputs}) > 1:  # type: ignore[union-attr, index]
                joined = node
    assert joined is not None
    assert joined.outputs[0].shape.numpy() == (4, POOLED + 6 * TIME_EMBEDDING)  # type: ignore[union-attr]
    assert {value.dtype.name for value in reached} == {"FLOAT"}  # type: ignore[union-attr]
    (after,) = (use.node for use in joined.outputs[0].uses())
    assert (after.op_type, after.outputs[0].dtype.name) == ("Cast", "FLOAT16")


def test_every_input_matters(source: ModelSource) -> None:
    """Else the tiny model could not show that one of them is left out or misplaced."""
    inputs = random_inputs(source, RECIPE)
    before = evaluate(source, RECIPE, inputs)
    for name in ("context", "context_2", "pooled", "time_ids", "guidance", "guidance_rescale"):
        changed = evaluate(source, RECIPE, inputs | {name: inputs[name].flip(0) * 0.5})
        assert float((changed - before).norm() / before.norm()) > 0.01, name


def encode(source: ModelSource, name: str, prompt: str, clip_skip: int) -> dict[str, torch.Tensor]:
    """The component's outputs by name, from torch, for ids that transformers' tokenizer made."""
    component = FAMILY.component(name)
    tokenizer = getattr(diffusers_pipeline(source.path), str(component.tokenizer))
    ids = tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        outputs = component.reference(source, RECIPE)(ids, torch.tensor([clip_skip]))
    names = [t.name for t in component.spec(source, BUCKET, RECIPE).outputs]
    return dict(zip(names, [outputs] if isinstance(outputs, torch.Tensor) else outputs, strict=True))


@pytest.mark.parametrize("clip_skip", [0, 1, 2])
def test_text_encoders_give_what_diffusers_encodes(source: ModelSource, clip_skip: int) -> None:
    """A prompt for each encoder; diffusers computes the negative ones without clip skip."""
    positive, negative, pooled, negative_pooled = diffusers_pipeline(source.path).encode_prompt(
        PROMPTS[0],
        prompt_2=PROMPTS[1],
        negative_prompt=PROMPTS[1],
        negative_prompt_2="a red square",
        clip_skip=clip_skip or None,
    )
    for prompts, skip, context, pool in (
        (PROMPTS, clip_skip, positive, pooled),
        ((PROMPTS[1], "a red square"), 0, negative, negative_pooled),
    ):
        first = encode(source, "text_encoder", prompts[0], skip)
        second = encode(source, "text_encoder_2", prompts[1], skip)
        torch.testing.assert_close(torch.cat([first["context"], second["context_2"]], dim=-1), context)
        torch.testing.assert_close(second["pooled"], pool)


def session(graph: Any, weights: Path, folder: Path) -> Any:
    """The graph in ONNX Runtime with the checkpoint's weights attached, in the graph's precision."""
    import onnx_ir as ir
    import onnxruntime
    from safetensors.numpy import load_file

    tensors = load_file(weights)
    for value in graph.graph.initializers.values():
        if is_weight(value):
            value.const_value = ir.tensor(tensors[value.name].astype(value.dtype.numpy()), name=value.name)
    ir.save(graph, folder / "graph.onnx")
    return onnxruntime.InferenceSession(folder / "graph.onnx", providers=["CPUExecutionProvider"])


def test_the_engine_computes_what_torch_does(source: ModelSource, model: Path, step_graph: Any, tmp_path: Path) -> None:
    engine = session(step_graph.clone(), model / "unet" / "diffusion_pytorch_model.safetensors", tmp_path)
    inputs = random_inputs(source, RECIPE)
    got = engine.run(None, {name: value.numpy() for name, value in inputs.items()})[0][0]
    np.testing.assert_allclose(got, evaluate(source, RECIPE, inputs).numpy(), rtol=1e-3, atol=1e-4)


def test_the_second_text_encoder_runs_in_float16(source: ModelSource, model: Path, tmp_path: Path) -> None:
    """All of it: its library makes the model inside the projection in a precision of its own."""
    component = FAMILY.component("text_encoder_2")
    graph = capture(component, source, in_dtype("float16", "text_encoder_2"), BUCKET)
    assert weight_dtypes(graph) == {"FLOAT16"}
    engine = session(graph, model / "text_encoder_2" / "model.safetensors", tmp_path)
    ids = diffusers_pipeline(model).tokenizer_2(PROMPTS[0], padding="max_length", return_tensors="pt").input_ids
    got = engine.run(None, {"ids": ids.numpy(), "clip_skip": np.array([1])})
    with torch.no_grad():
        half = component.reference(source, RECIPE).half()(ids, torch.tensor([1]))
    for ours, torchs, exact in zip(got, half, encode(source, "text_encoder_2", PROMPTS[0], 1).values(), strict=True):
        # The two round in another order; 3 dB is an error of 1.4 times torch's own.
        assert snr_db(ours, exact.numpy()) > snr_db(torchs.numpy(), exact.numpy()) - 3


def snr_db(got: np.ndarray, exact: np.ndarray) -> float:
    return float(10 * np.log10((exact**2).sum() / ((got - exact) ** 2).sum()))


# Configs

Edit = Callable[[Path], None]


def change(file: str, **entries: Any) -> Edit:
    """Sets entries of a JSON file; None removes one."""

    def edit(folder: Path) -> None:
        data = json.loads((folder / file).read_text()) | entries
        (folder / file).write_text(json.dumps({k: v for k, v in data.items() if v is not None}))

    return edit


def remove(file: str) -> Edit:
    return lambda folder: (folder / file).unlink()


def both(first: Edit, second: Edit) -> Edit:
    def edit(folder: Path) -> None:
        first(folder)
        second(folder)

    return edit


BAD_CONFIGS: dict[str, tuple[Edit, list[str]]] = {
    "refiner": (
        change("model_index.json", text_encoder=[None, None], tokenizer=[None, None]),
        ["no first text encoder", "refiner", "model_index.json", "use the base model"],
    ),
    "refiner without the entry": (change("model_index.json", text_encoder=None), ["no first text encoder"]),
    "refiner as published": (
        change("model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None]),
        ["no first text encoder", "refiner"],
    ),
    "no second encoder": (change("model_index.json", text_encoder_2=None), ["the model has no text_encoder_2"]),
    "second encoder without projection": (
        change("model_index.json", text_encoder_2=["transformers", "CLIPTextModel"]),
        ["text_encoder_2 is of an unsupported class", "CLIPTextModelWithProjection"],
    ),
    "foreign tokenizer": (
        change("model_index.json", tokenizer_2=["transformers", "T5Tokenizer"]),
        ["tokenizer_2 is of an unsupported class", "T5Tokenizer"],
    ),
    "first encoder of another width": (
        change("text_encoder/config.json", hidden_size=64),
        ["does not fit the UNet", "cross_attention_dim = 112", "80"],
    ),
    "second encoder of another width": (
        change("text_encoder_2/config.json", hidden_size=64),
        ["does not fit the UNet", "cross_attention_dim = 96", "both text encoders"],
    ),
    "width that is no number": (change("text_encoder_2/config.json", hidden_size="48"), ["hidden_size is not a size"]),
    "no layers": (change("text_encoder_2/config.json", num_hidden_layers=0), ["num_hidden_layers is not a size"]),
    "pooled prompt of another width": (
        change("text_encoder_2/config.json", projection_dim=48),
        ["projection_class_embeddings_input_dim = 96", f"got: {POOLED + 6 * TIME_EMBEDDING}"],
    ),
    "time ids of another width": (
        change("unet/config.json", addition_time_embed_dim=16),
        [f"projection_class_embeddings_input_dim = {POOLED + 6 * 16}", "6 times addition_time_embed_dim"],
    ),
    "encoders of two lengths": (
        both(
            change("text_encoder_2/config.json", max_position_embeddings=32),
            change("tokenizer_2/tokenizer_config.json", model_max_length=32),
        ),
        ["prompts of different lengths", "max_position_embeddings = 24", "32"],
    ),
    "second tokenizer of another length": (
        change("tokenizer_2/tokenizer_config.json", model_max_length=77),
        ["the tokenizer and the text encoder take prompts of different lengths", "text_encoder_2/config.json", "77"],
    ),
    "second tokenizer without words": (
        both(remove("tokenizer_2/tokenizer.json"), remove("tokenizer_2/vocab.json")),
        ["the tokenizer is incomplete", "tokenizer_2"],
    ),
    "plain unet": (
        change("unet/config.json", addition_embed_type=None),
        ["family sdxl does not cover this UNet", 'addition_embed_type = "text_time"', "None"],
    ),
    "other addition": (change("unet/config.json", addition_embed_type="image"), ["got: 'image'"]),
    "distilled unet": (change("unet/config.json", time_cond_proj_dim=256), ["family sdxl", "guidance-distilled"]),
    "inpainting": (change("unet/config.json", in_channels=9), ["inpainting", "in_channels = 4", "9"]),
    "normalised latents": (
        change("vae/config.json", latents_mean=[0.1, 0.2, 0.3], latents_std=[1, 1, 1]),
        ["normalised in other channels", "of 4 numbers", "3 numbers"],
    ),
    "code of its own": (change("text_encoder_2/config.json", auto_map={"A": "b.C"}), ["code of its own"]),
}


def refused(folder: Path, recipe: Recipe, error: type[DiffbuildError]) -> str:
    with pytest.raises(error) as caught:
        family_of(resolve_model(str(folder)), recipe)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD_CONFIGS)
def test_bad_configs_are_named(model: Path, tmp_path: Path, case: str) -> None:
    edit, messages = BAD_CONFIGS[case]
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    edit(folder)
    text = refused(folder, RECIPE, ModelError)
    assert all(message in text for message in messages), text


def test_a_good_model_is_accepted(source: ModelSource) -> None:
    assert family_of(source, RECIPE) is FAMILY


def test_a_model_is_not_taken_for_another_family(model: Path, tiny_model: Path) -> None:
    text = refused(model, replace(RECIPE, family="sd"), ModelError)
    assert "the recipe is for another family" in text
    assert "use a recipe with family = 'sdxl'" in text
    assert "use a recipe with family = 'sd'" in refused(tiny_model, RECIPE, ModelError)


def test_a_vae_that_overflows_is_not_compiled_in_float16(model: Path, tmp_path: Path) -> None:
    recipe = in_dtype("float16", "vae_decoder", "vae_encoder")
    text = refused(model, recipe, RecipeError)
    assert "overflows in float16" in text
    assert "tiny: components.vae_decoder.dtype" in text
    encoder = in_dtype("float16", "vae_encoder")
    assert "components.vae_encoder.dtype" in refused(model, encoder, RecipeError)
    family_of(resolve_model(str(model)), replace(encoder, without=("vae_encoder",)))
    family_of(resolve_model(str(model)), in_dtype("bfloat16", "vae_decoder"))
    kept = replace(RECIPE, components={"vae_decoder": ComponentRecipe("float16", ("decoder.up_blocks.*",))})
    family_of(resolve_model(str(model)), kept)
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    change("vae/config.json", force_upcast=False)(folder)
    family_of(resolve_model(str(folder)), recipe)


@pytest.mark.parametrize(("written", "zeros"), [(True, True), (False, False), (None, True)])
def test_settings(model: Path, tmp_path: Path, written: bool | None, zeros: bool) -> None:
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    change("model_index.json", force_zeros_for_empty_prompt=written)(folder)
    settings = FAMILY.settings(resolve_model(str(folder)))
    assert settings.zero_negative is zeros
    assert settings.max_clip_skip == min(LAYERS.values()) - 1
    assert (settings.vae_factor, settings.multiple) == (8, 8)


@pytest.mark.parametrize("name", ["sdxl-fp16", "sdxl-fp32"])
def test_the_recipes_fit_the_published_configs(tmp_path: Path, name: str) -> None:
    PUBLISHED["sdxl"].write(tmp_path)
    source, recipe = resolve_model(str(tmp_path)), load_recipe(ROOT / "recipes" / f"{name}.toml")
    family = family_of(source, recipe)
    settings = family.settings(source)
    assert settings.max_clip_skip == 11
    assert all(b.height % settings.multiple == b.width % settings.multiple == 0 for b in recipe.buckets)
    spec = family.component("denoiser").spec(source, recipe.buckets[0], recipe)
    assert {t.name: t.shape for t in spec.inputs[6:]} == {
        "guidance_rescale": (1,),
        "context": (2, 77, 768),
        "context_2": (2, 77, 1280),
        "pooled": (2, 1280),
        "time_ids": (2, 6),
    }


def test_a_watermark_that_diffusers_would_add_is_told(model: Path, tmp_path: Path, caplog: Any) -> None:
    FAMILY.check(resolve_model(str(model)), RECIPE)
    assert not caplog.records
    marked = shutil.copytree(model, tmp_path / "marked")
    index = json.loads((marked / "model_index.json").read_text())
    (marked / "model_index.json").write_text(json.dumps(index | {"add_watermarker": True}))
    FAMILY.check(resolve_model(str(marked)), RECIPE)
    assert "asks for an invisible watermark (add_watermarker)" in caplog.text
