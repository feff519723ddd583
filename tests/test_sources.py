"""Models as people have them, of other pipelines, tools and releases: their pictures are diffusers'."""

from __future__ import annotations

import inspect
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import toolchain
from tests.parity import LEAST_PSNR_DB, Build, draw_with_diffusers, least_psnr_db
from tests.tiny import make_sd, recipe_for
from tests.tiny_flux import make_flux
from tests.tiny_sdxl import make_sdxl
from tests.tiny_single_file import read, write_single_file
from toolchain.builder.open_model import open_model
from toolchain.builder.plan import make_plan
from toolchain.check.reference import reference_pipeline
from toolchain.cli.main import cli
from toolchain.errors import ModelError, UsageError
from toolchain.models.component import Family
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS, family_for
from toolchain.runtime.prompt import PromptTokenizer
from toolchain.store.artifacts import Store

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
# Built as "tiny", the name of the shared bundle's recipe: what another test finds in the store goes by that.
RECIPE = """\
family = "sd"
buckets = ["1x64x64"]
[sampling]
steps = 4
[check]
prompts = ["a red circle"]
"""


def compare(pipe: toolchain.Pipeline, model: Path, prompt: str, negative: str) -> float:
    ours = pipe(prompt, seed=3, steps=4, guidance=5.0, negative_prompt=negative).images
    options: dict[str, Any] = {"negative_prompt": [negative], "num_inference_steps": 4, "guidance_scale": 5.0}
    options |= {"height": 64, "width": 64}
    theirs = draw_with_diffusers("StableDiffusionPipeline", model, [prompt], [3], "model", **options)
    return least_psnr_db(ours, theirs)


def test_a_textual_inversion_of_several_vectors(build: Build, tiny_model: Path, tmp_path: Path) -> None:
    from diffusers import StableDiffusionPipeline

    theirs = StableDiffusionPipeline.from_pretrained(tiny_model)
    torch.manual_seed(1)
    theirs.load_textual_inversion({"<s>": torch.randn(3, 32)}, token="<s>")
    theirs.load_textual_inversion({"<bad>": torch.randn(2, 32)}, token="<bad>")
    theirs.save_pretrained(tmp_path / "model")
    pipe = build("tiny", tmp_path / "model", RECIPE)
    assert compare(pipe, tmp_path / "model", "a red <s> on white", "<bad> circle") >= LEAST_PSNR_DB


def test_textual_inversions_of_both_text_encoders(tmp_path: Path) -> None:
    from diffusers import StableDiffusionXLPipeline

    model = make_sdxl(tmp_path / "model")
    theirs = StableDiffusionXLPipeline.from_pretrained(model)
    vectors = {"tokenizer": ["<s>", "<s>_1"], "tokenizer_2": ["<s>", "<s>_1", "<s>_2"]}
    for name, tokens in vectors.items():
        tokenizer = getattr(theirs, name)
        tokenizer.add_tokens(tokens)
        tokenizer.save_pretrained(model / name)
    plan = make_plan(recipe_for(family="sdxl"), resolve_model(str(model)), Store(tmp_path / "store"))
    for step in (step for step in plan.steps if step.stage == "tokenizer"):
        name = step.id.component
        step.run({}, tmp_path / name, lambda *_: None)
        tokenizer = getattr(theirs, name)
        prompt = theirs.maybe_convert_prompt("a <s> on white", tokenizer)
        expected = tokenizer(prompt, padding="max_length", max_length=24, truncation=True).input_ids
        assert PromptTokenizer(tmp_path / name).encode("a <s> on white").ids[0].tolist() == expected
        assert prompt.count("<s>") == len(vectors.pop(name))
    assert not vectors


def as_a_whole_clip_model(folder: Path) -> None:
    """The text encoder inside of the model that it was trained with, as the original CLIP is published."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextModel

    text = CLIPTextModel.from_pretrained(folder)
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=text.config.to_dict(), vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=32
    )
    whole = CLIPModel(config)
    whole.text_model.load_state_dict(text.state_dict())
    shutil.rmtree(folder)
    whole.save_pretrained(folder)


def test_a_whole_clip_model_as_text_encoder(build: Build, tiny_copy: Path) -> None:
    as_a_whole_clip_model(tiny_copy / "text_encoder")
    config = tiny_copy / "text_encoder" / "config.json"
    read = json.loads(config.read_text())
    assert "hidden_size" not in read
    config.write_text(json.dumps(read | {"attn_implementation": "eager"}))
    pipe = build("tiny", tiny_copy, RECIPE)
    assert compare(pipe, tiny_copy, "a red circle", "white") >= LEAST_PSNR_DB


def test_a_folder_that_a_controlnet_pipeline_saved(
    tiny_model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every key is the base model's, and so is every engine; diffusers' pipeline to compare with is the base class."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline, StableDiffusionPipeline

    base = StableDiffusionPipeline.from_pretrained(tiny_model)
    nets = [ControlNetModel.from_unet(base.unet, conditioning_embedding_out_channels=(8, 8)) for _ in range(2)]
    StableDiffusionControlNetPipeline(
        **base.components | {"controlnet": nets}, requires_safety_checker=False
    ).save_pretrained(tmp_path / "model")
    keys = []
    for model in (tiny_model, tmp_path / "model"):
        recipe, source = recipe_for(), resolve_model(str(model))
        plan = make_plan(recipe, source, Store(tmp_path / "store"))
        keys.append([step.key for step in plan.steps if step.stage != "tokenizer"])
    assert keys[0] == keys[1]
    assert caplog.text.count("saved by StableDiffusionControlNetPipeline over ordinary networks") == 1
    pipeline, changed = reference_pipeline(source, plan.family, recipe)
    assert type(pipeline) is StableDiffusionPipeline
    assert "StableDiffusionPipeline in place of StableDiffusionControlNetPipeline" in changed


@pytest.mark.parametrize("family", MODELS.values(), ids=lambda family: family.name)
def test_pipelines_over_ordinary_networks(family: Family) -> None:
    """diffusers has each class, and it takes every component of the family."""
    import diffusers

    for name in family.others:
        taken = inspect.signature(getattr(diffusers, name).__init__).parameters
        assert {component.folder for component in family.components} <= set(taken), name


def test_a_plan_knows_weights_that_no_build_could_read(tiny_copy: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_copy / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    save_file({k.replace(".to_q.", ".to_q.base_layer."): v for k, v in tensors.items()}, path)
    with pytest.raises(ModelError, match="LoRA") as caught:
        make_plan(recipe_for(), resolve_model(str(tiny_copy)), Store(tmp_path / "store"))
    assert "unload_lora_weights" in str(caught.value)


def configs_of(model: Path, out: Path) -> Path:
    """A model's folder without weights: what `--config` needs."""
    shutil.copytree(model, out, ignore=shutil.ignore_patterns("*.safetensors"))
    return out


@pytest.fixture
def narrow_flux(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' converter knows the width of FLUX.1 as a constant; the tiny model's stands in its place."""
    from diffusers.loaders.single_file_utils import convert_flux_transformer_checkpoint_to_diffusers as converter

    code = converter.__code__
    assert 3072 in code.co_consts
    consts = tuple(32 if const == 3072 else const for const in code.co_consts)
    monkeypatch.setattr(converter, "__code__", code.replace(co_consts=consts))


MAKERS = {"sd1": make_sd, "sd2": make_sd, "sdxl": make_sdxl, "flux": make_flux}


@pytest.mark.parametrize("kind", MAKERS)
def test_a_single_file_holds_the_model_that_it_was_made_of(kind: str, tmp_path: Path, narrow_flux: None) -> None:
    model = MAKERS[kind](tmp_path / "model")
    path = write_single_file(model, kind, tmp_path / "one.safetensors")
    config = str(configs_of(model, tmp_path / "config"))
    source = open_model(str(path), config=config, store=tmp_path / "store")
    plain = resolve_model(str(model))
    assert source.name == str(path)
    assert source.index["_class_name"] == plain.index["_class_name"]
    for component in family_for(plain).components:
        ours, theirs = (read(s.path / component.folder) for s in (source, plain))
        assert ours.keys() == theirs.keys()
        assert all((ours[key] == theirs[key]).all() for key in theirs)
    again = open_model(str(path), config=config, store=tmp_path / "store")
    assert again.path == source.path


def test_a_single_file_draws_what_diffusers_draws_of_it(tiny_model: Path, tmp_path: Path, store: Path) -> None:
    from diffusers import StableDiffusionPipeline

    path = write_single_file(tiny_model, "sd1", tmp_path / "one.safetensors")
    config = str(configs_of(tiny_model, tmp_path / "config"))
    (tmp_path / "tiny.toml").write_text(RECIPE)
    arguments = ["--model", str(path), "--config", config, "--store", str(store), "--output", str(tmp_path / "bundle")]
    done = CliRunner().invoke(cli, ["build", str(tmp_path / "tiny.toml"), *arguments], catch_exceptions=False)
    assert done.exit_code == 0
    assert f"{path} is converted once, with the configs of {config}" in done.stderr
    theirs = StableDiffusionPipeline.from_single_file(str(path), config=config, local_files_only=True)
    options: dict[str, Any] = {"num_inference_steps": 4, "guidance_scale": 5.0, "height": 64, "width": 64}
    picture = theirs("a red circle", generator=torch.Generator().manual_seed(3), **options).images[0]
    ours = toolchain.load(tmp_path / "bundle")("a red circle", seed=3, steps=4, guidance=5.0).images
    assert least_psnr_db(ours, [picture]) >= LEAST_PSNR_DB


def test_averaged_weights_in_a_single_file_are_left_out(tiny_model: Path, tmp_path: Path) -> None:
    """As diffusers does; their names have lost their dots, and end like those of quantised weights."""
    from safetensors.torch import load_file, save_file

    path = write_single_file(tiny_model, "sd1", tmp_path / "one.safetensors")
    tensors = load_file(path)
    network = {k: v for k, v in tensors.items() if k.startswith("model.diffusion_model")}
    averaged = {"model_ema." + k.removeprefix("model.").replace(".", ""): v * 0.5 for k, v in network.items()}
    assert any(name.endswith("to_qweight") for name in averaged)
    save_file({**tensors, **averaged, "model_ema.decay": torch.tensor(0.9)}, path)
    source = open_model(str(path), config=str(tiny_model), store=tmp_path / "store")
    for folder in ("unet", "vae"):
        (theirs,) = (tiny_model / folder).glob("*.safetensors")
        (ours,) = (source.path / folder).glob("*.safetensors")
        assert all(torch.equal(tensor, load_file(ours)[name]) for name, tensor in load_file(theirs).items())


def test_a_single_file_without_a_network_needs_configs(tiny_model: Path, tmp_path: Path) -> None:
    path = write_single_file(tiny_model, "sd1", tmp_path / "one.safetensors")
    with pytest.raises(ModelError, match="stable-diffusion-v1-5") as caught:
        open_model(str(path), store=tmp_path / "store")
    assert "--config DIR" in str(caught.value)
    assert not (tmp_path / "store").exists()


def test_configs_belong_to_a_single_file(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="single file"):
        open_model(str(tiny_model), config=str(tiny_model))
    with pytest.raises(UsageError, match="revision"):
        open_model(str(tiny_model / "unet" / "diffusion_pytorch_model.safetensors"), "main")


@pytest.mark.parametrize(("name", "says"), [("a.ckpt", "a pickle can run code"), ("a.gguf", "GGUF")])
def test_single_files_that_are_not_opened(tmp_path: Path, name: str, says: str) -> None:
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ModelError, match=says):
        open_model(str(tmp_path / name))


def test_a_part_of_a_model_in_a_single_file_is_named(tiny_model: Path, tmp_path: Path) -> None:
    """And nothing of it stays in the store."""
    from safetensors.torch import load_file, save_file

    path = write_single_file(tiny_model, "sd1", tmp_path / "one.safetensors")
    tensors = load_file(path)
    save_file({k: v for k, v in tensors.items() if "middle_block" not in k}, path)
    with pytest.raises(ModelError, match="lacks tensors"):
        open_model(str(path), config=str(tiny_model), store=tmp_path / "store")
    save_file({**tensors, "scaled_fp8": torch.zeros(1)}, path)
    with pytest.raises(ModelError, match="quantised"):
        open_model(str(path), config=str(tiny_model), store=tmp_path / "store")
    assert list(Store(tmp_path / "store").artifacts()) == []
