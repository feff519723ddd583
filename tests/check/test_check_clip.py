"""CLIP scores of a check, by a tiny CLIP model on disk, against what transformers computes by itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import toolchain
from tests.check.page_samples import bundle, picture, report
from tests.tiny import TEXT_LENGTH, clip_tokenizer
from toolchain.check.clip import require_clip, score_pictures
from toolchain.check.page import render
from toolchain.cli.main import cli
from toolchain.errors import ModelError

RECIPE = """
family = "sd"
buckets = ["1x64x64"]
without = ["vae_encoder"]
[sampling]
steps = 2
step_counts = [2]
[check]
prompts = ["a red circle"]
"""


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model of transformers with random weights and its tokenizer, as they are on the hub."""
    import torch
    from transformers import CLIPConfig, CLIPModel

    folder = tmp_path_factory.mktemp("clip")
    tokenizer = clip_tokenizer(folder)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**size, **tokens, "vocab_size": len(tokenizer), "max_position_embeddings": TEXT_LENGTH}
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 32, "patch_size": 8}, projection_dim=16)
    CLIPModel(config).save_pretrained(folder)
    return folder


def expected(clip: Path, prompt: str, pixels: np.ndarray) -> float:
    import torch
    from transformers import CLIPImageProcessorPil, CLIPModel, CLIPTokenizerFast

    processor = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model = CLIPModel.from_pretrained(clip).eval()
    tokens = CLIPTokenizerFast.from_pretrained(clip)(prompt, return_tensors="pt")
    with torch.inference_mode():
        image = processor(images=pixels, return_tensors="pt")["pixel_values"]
        logits = model(pixel_values=image, **tokens).logits_per_image / model.logit_scale.exp()
    return 100 * float(logits[0, 0])


def test_scores_are_those_of_transformers(clip: Path) -> None:
    pictures = [picture("a red circle on a white background", 3), picture("a blue square", 40, (64, 64))]
    said: list[str] = []
    scored = score_pictures(clip, pictures, said.append)
    for one in scored:
        assert one.pixels is not None
        assert one.clip is not None
        wanted = [expected(clip, one.prompt, pixels) for pixels in (one.pixels.reference, one.pixels.compiled)]
        assert one.clip == pytest.approx(wanted, abs=0.01)
    assert len({one.clip for one in scored}) == 2
    assert said[-1] == "CLIP scores: 2 of 2"
    compared = report([], scored)
    assert compared.to_json()["summary"]["clip"].keys() == {"reference", "compiled"}
    assert any(line.startswith("2 pictures, CLIP score: median ") for line in compared.lines())
    assert "CLIP score " in render(compared, bundle())


def test_check_takes_a_folder(clip: Path, tiny_model: Path, store: Path, tmp_path: Path) -> None:
    (tmp_path / "small.toml").write_text(RECIPE)
    toolchain.build(tmp_path / "small.toml", str(tiny_model), tmp_path / "bundle", store=store)
    arguments = ["check", str(tmp_path / "bundle"), "--model", str(tiny_model), "--clip", str(clip), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    (drawn,) = json.loads(done.stdout)["pictures"]
    assert drawn["clip"]["compiled"] == pytest.approx(drawn["clip"]["reference"], abs=0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), r"got: no model\.safetensors\n.*hf download"),
        (lambda folder: (folder / "config.json").write_text('{"model_type": "bert"}'), "got: model_type 'bert'"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be read"),
        (lambda folder: (folder / "config.json").write_text("[]"), "got: model_type None"),
    ],
)
def test_a_folder_that_is_no_clip_model_is_refused_first(
    clip: Path, tmp_path: Path, tiny_bundle: Path, tiny_model: Path, change: Any, message: str
) -> None:
    folder = tmp_path / "clip"
    folder.mkdir()
    for file in clip.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    require_clip(folder)
    change(folder)
    said: list[str] = []
    with pytest.raises(ModelError, match=message):
        toolchain.check_bundle(tiny_bundle, str(tiny_model), clip=folder, progress=said.append)
    assert said == []
