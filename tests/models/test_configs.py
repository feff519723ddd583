"""What diffusers and transformers read of a model's configs: a setting is covered, refused, or changes nothing here.

A network's own settings are read by its class, and that class is what is exported. What goes around the networks is
ours, and so the settings that diffusers' pipelines read are listed one by one.
"""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.parity import LEAST_PSNR_DB, Build, least_psnr_db
from tests.tiny import TEXT_LENGTH, make_sd, make_vae, recipe_for
from tests.tiny import write_tokenizer as write_vocabulary
from toolchain.export.capture import capture
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS, family_of
from toolchain.models.tokenizers import write_tokenizer
from toolchain.models.vae import normalised, scaled, shifted
from toolchain.runtime.prompt import PromptTokenizer

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")

# Each reason begins with its kind: "covered" by a part of the step, the VAE or the runtime; "checked" when a recipe is
# planned, so that one value alone is left; "refused"; "scheduler", whose tables are made and checked by driving
# diffusers' own class; "nothing", and why it changes nothing here.
SIZE = "nothing: pictures have the sizes of the recipe's buckets"
SHIFT = "scheduler: dynamic shifting, ModelSettings.tokens"
READ: dict[tuple[str, str], str] = {
    ("scheduler", "clip_sample"): "scheduler: the pipeline's own correction of old configs",
    ("scheduler", "steps_offset"): "scheduler: the pipeline's own correction of old configs",
    ("scheduler", "num_train_timesteps"): "nothing: of denoising_start and denoising_end, which there are not here",
    ("scheduler", "base_image_seq_len"): SHIFT,
    ("scheduler", "base_shift"): SHIFT,
    ("scheduler", "max_image_seq_len"): SHIFT,
    ("scheduler", "max_shift"): SHIFT,
    ("scheduler", "use_dynamic_shifting"): SHIFT,
    ("scheduler", "use_flow_sigmas"): "scheduler: ModelSettings.linear_sigmas",
    ("text_encoder", "use_attention_mask"): "covered: the input mask of SD's text encoder",
    ("text_encoder_2", "projection_dim"): "checked: projection_class_embeddings_input_dim",
    ("tokenizer", "model_max_length"): "checked: the text encoder's max_position_embeddings",
    ("tokenizer", "batch_decode"): "nothing: a method, for the warning about a prompt that is cut",
    ("tokenizer_2", "batch_decode"): "nothing: a method, for the warning about a prompt that is cut",
    ("tokenizer_3", "batch_decode"): "nothing: a method, for the warning about a prompt that is cut",
    ("unet", "_diffusers_version"): SIZE,
    ("unet", "sample_size"): SIZE,
    ("transformer", "sample_size"): SIZE,
    ("unet", "in_channels"): "checked: the VAE's latent_channels",
    ("unet", "addition_time_embed_dim"): "checked: projection_class_embeddings_input_dim",
    ("unet", "time_cond_proj_dim"): "refused: guidance-distilled UNets",
    ("unet", "time_embedding_type"): "nothing: stands in the text of an error alone",
    ("transformer", "in_channels"): "checked: the VAE's latent_channels",
    ("transformer", "joint_attention_dim"): "checked: T5's d_model",
    ("transformer", "patch_size"): "covered: ModelSettings.token_pixels",
    ("transformer", "guidance_embeds"): "covered: ModelSettings.embedded_guidance",
    ("vae", "block_out_channels"): "covered: ModelSettings.vae_factor",
    ("vae", "latent_channels"): "covered: the shape of latents",
    ("vae", "scaling_factor"): "covered: models.vae",
    ("vae", "shift_factor"): "covered: models.vae.shifted",
    ("vae", "latents_mean"): "covered: models.vae.normalised",
    ("vae", "latents_std"): "covered: models.vae.normalised",
    ("vae", "force_upcast"): "covered: float16 is refused for such a VAE",
    ("self", "force_zeros_for_empty_prompt"): "covered: ModelSettings.zero_negative",
    ("self", "requires_aesthetics_score"): "checked: of refiners, which have no first text encoder and other time ids",
}
PIPELINES = {
    "sd": ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline"),
    "sdxl": ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline"),
    "sd3": ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline"),
    "flux": ("FluxPipeline", "FluxImg2ImgPipeline"),
}
SETTING = re.compile(r'(\w+)\.config(?:\.get\("(\w+)"|\.(?!get\b)(\w+)|, "(\w+)")|self\.(tokenizer\w*)\.(\w+)')


def settings_read(code: str) -> set[tuple[str, str]]:
    found = (match.groups() for match in SETTING.finditer(code))
    return {(owner or tokenizer, a or b or c or d) for owner, a, b, c, tokenizer, d in found}


def test_every_setting_that_a_pipeline_reads_has_its_place() -> None:
    import diffusers

    read: set[tuple[str, str]] = set()
    for names in PIPELINES.values():
        for name in names:
            read |= settings_read(inspect.getsource(getattr(diffusers, name)))
    assert read == READ.keys()
    kinds = {reason.partition(":")[0] for reason in READ.values()}
    assert kinds == {"covered", "checked", "refused", "scheduler", "nothing"}


LOADING = {"_name_or_path", "dtype", "torch_dtype", "architectures", "transformers_version", "_diffusers_version"}


def test_no_setting_is_lost_between_a_config_and_its_network(tiny_model: Path) -> None:
    """What is exported has the settings of what diffusers loads, defaults included."""
    source, recipe = resolve_model(str(tiny_model)), recipe_for()
    for component in MODELS["sd"].parts(recipe):
        made, loaded = (
            wrapper.get_submodule(component.prefix.rstrip(".")).config
            for wrapper in (component.module(source, recipe), component.reference(source, recipe))
        )
        plain = [dict(c if hasattr(c, "items") else c.to_dict()) for c in (made, loaded)]
        own, theirs = ({k: v for k, v in c.items() if k not in LOADING | {"_use_default_values"}} for c in plain)
        assert len(theirs) > 10
        assert own == theirs


TOKENIZER: list[tuple[str, Any]] = [
    ("add_prefix_space", True),
    ("do_lower_case", False),
    ("errors", "strict"),
    ("unk_token", "!"),
    ("bos_token", "a</w>"),
    ("eos_token", "!"),
    ("pad_token", "!"),
    ("clean_up_tokenization_spaces", True),
    ("split_special_tokens", True),
    ("additional_special_tokens", ["red</w>"]),
    ("add_bos_token", False),
    ("truncation", True),
    ("stride", 2),
]
TEXTS = ["", "A RED circle", "a<|startoftext|>b <|endoftext|> a", "h\u00e9 it's  don't !", " x" * 40, "\u65e5\u672c"]


@pytest.mark.parametrize(("key", "value"), TOKENIZER, ids=[key for key, _ in TOKENIZER])
def test_settings_of_a_tokenizer(tmp_path: Path, key: str, value: Any) -> None:
    """Ids and mask of the runtime's tokenizer, whatever the setting, are transformers'."""
    from transformers import CLIPTokenizer

    write_vocabulary(tmp_path / "model")
    config = {"model_max_length": TEXT_LENGTH, "tokenizer_class": "CLIPTokenizer", key: value}
    (tmp_path / "model" / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = CLIPTokenizer.from_pretrained(tmp_path / "model")(
        TEXTS, padding="max_length", max_length=TEXT_LENGTH, truncation=True, return_tensors="np"
    )
    write_tokenizer(tmp_path / "model", "CLIPTokenizer", TEXT_LENGTH, tmp_path / "out", t5=False, inversion=True)
    ours = [PromptTokenizer(tmp_path / "out").encode(text) for text in TEXTS]
    np.testing.assert_array_equal(np.concatenate([e.ids for e in ours]), theirs.input_ids)
    np.testing.assert_array_equal(np.concatenate([e.mask for e in ours]), theirs.attention_mask)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


RECIPE = """\
family = "sd"
buckets = ["1x64x64"]
[sampling]
steps = 3
step_counts = [3]
[check]
prompts = ["a"]
"""


def test_settings_around_the_networks_of_sd(build: Build, tmp_path_factory: pytest.TempPathFactory) -> None:
    """All at once: padding is hidden, text that looks like a special token is text, and what SD ignores is ignored."""
    from diffusers import StableDiffusionPipeline

    model = make_sd(tmp_path_factory.mktemp("settings") / "model")
    edit(model / "text_encoder/config.json", use_attention_mask=True, return_dict=False, output_attentions=True)
    edit(model / "tokenizer/tokenizer_config.json", split_special_tokens=True)
    edit(model / "vae/config.json", shift_factor=0.3, latents_mean=[0.5] * 4, latents_std=[2.0] * 4)
    pipe = build("settings", model, RECIPE)
    prompts, seeds = ["a red<|endoftext|>circle", "a blue square"], [3, 9]
    ours = pipe(prompts, negative_prompt="left of", seed=seeds, steps=3, guidance=5.0).images
    reference = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    reference.set_progress_bar_config(disable=True)
    run: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 5.0, "height": 64, "width": 64}

    def draw() -> list[Any]:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        return list(reference(prompts, negative_prompt=["left of"] * 2, generator=generators, **run).images)

    assert least_psnr_db(ours, draw()) >= LEAST_PSNR_DB
    reference.text_encoder.config.use_attention_mask = False
    assert least_psnr_db(ours, draw()) < LEAST_PSNR_DB


def test_what_scales_latents_is_the_pipeline_s_to_read() -> None:
    config = {"scaling_factor": 0.5, "shift_factor": 0.1, "latents_mean": [1.0, 2.0], "latents_std": [2.0, 4.0]}
    assert scaled(config) == (0.5, 0.0)
    assert shifted(config) == (0.5, 0.1)
    assert normalised(config) == ((0.25, 0.125), (1.0, 2.0))
    assert normalised(config | {"latents_std": None}) == (0.5, 0.0)
    assert scaled({}) == (0.18215, 0.0)


def test_latents_that_are_normalised_channel_by_channel(tmp_path: Path) -> None:
    """SDXL's, in the words of its pipeline; and the graph holds the numbers, though it is made under fake tensors."""
    from tests.tiny_sdxl import make_sdxl

    model = make_sdxl(tmp_path / "model")
    mean, std = [0.1, 0.2, -0.3, 0.4], [2.0, 1.0, 0.5, 1.5]
    torch.manual_seed(0)
    vae = make_vae(4, scaling_factor=0.5, latents_mean=mean, latents_std=std).eval()
    vae.save_pretrained(model / "vae")
    source, recipe = resolve_model(str(model)), recipe_for(family="sdxl")
    family = family_of(source, recipe)
    latents = torch.randn(1, 4, 8, 8)
    means, stds = torch.tensor(mean).view(1, 4, 1, 1), torch.tensor(std).view(1, 4, 1, 1)
    with torch.no_grad():
        expected = vae.decode(latents * stds / vae.config.scaling_factor + means).sample
        _, image = family.component("vae_decoder").reference(source, recipe)(latents)
        torch.testing.assert_close(image, (expected / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
        pixels, zeros, one = (
            torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8),
            torch.zeros(1, 4, 8, 8),
            torch.ones(1),
        )
        posterior = vae.encode(2 * (pixels.float() / 255).permute(0, 3, 1, 2) - 1).latent_dist
        encoded = family.component("vae_encoder").reference(source, recipe)(pixels, zeros, zeros, one, 0 * one)
        torch.testing.assert_close(encoded, (posterior.mean - means) * vae.config.scaling_factor / stds)
    graph = capture(family.component("vae_decoder"), source, recipe, recipe.buckets[0]).graph
    constants = [v.const_value.numpy() for v in graph.initializers.values() if v.shape == [1, 4, 1, 1]]  # type: ignore[union-attr]
    assert any(np.allclose(c.ravel(), mean) for c in constants)
    assert any(np.allclose(c.ravel(), 0.5 / np.array(std)) for c in constants)


@pytest.mark.parametrize(("value", "embedded"), [(True, True), (1, True), (False, False), (None, False)])
def test_guidance_embeds_is_whatever_is_true(tmp_path: Path, value: object, embedded: bool) -> None:
    from toolchain.models.flux_components import embeds_guidance
    from toolchain.models.source import ModelSource

    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps({"guidance_embeds": value}))
    assert embeds_guidance(ModelSource(tmp_path, "m", None)) is embedded


def test_families_are_those_whose_pipelines_are_read() -> None:
    assert {name: family.pipeline for name, family in MODELS.items()} == {n: p[0] for n, p in PIPELINES.items()}
