"""Where a model comes from: folders, hub ids, and what is refused before anything is run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from toolchain.errors import ModelError
from toolchain.models import family_of, resolve_model
from toolchain.models.source import select_files


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_taken_as_it_is(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model))
    assert source.path == tiny_model.resolve()
    assert source.revision is None
    assert family_of(source, "sd").name == "sd"


BAD_MODELS = [
    ("model_index.json", {"_class_name": "FooPipeline"}, "FooPipeline is not supported"),
    (
        "model_index.json",
        {"_class_name": "StableDiffusionPipelin"},
        "nearest supported class is StableDiffusionPipeline",
    ),
    ("model_index.json", {"_class_name": ["pipeline", "Mine"]}, "code"),
    ("model_index.json", {"unet": ["my_unet", "MyUNet"]}, "outside diffusers and transformers"),
    ("model_index.json", {"unet": None}, "the model has no unet"),
    ("model_index.json", {"unet": ["diffusers", "UNet3DConditionModel"]}, "unsupported class"),
    ("unet/config.json", {"in_channels": 9}, "inpainting"),
    ("unet/config.json", {"time_cond_proj_dim": 256}, "LCM"),
    ("unet/config.json", {"addition_embed_type": "text_time"}, "SDXL"),
    ("unet/config.json", {"cross_attention_dim": 1024}, "the text encoder does not fit the UNet"),
]


@pytest.mark.parametrize(("file", "changes", "message"), BAD_MODELS)
def test_unsupported_models(tiny_copy: Path, file: str, changes: dict[str, object], message: str) -> None:
    edit(tiny_copy / file, **changes)
    with pytest.raises(ModelError) as error:
        family_of(resolve_model(str(tiny_copy)), "sd")
    assert message in str(error.value)


def test_a_recipe_of_another_family(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="unknown family"):
        family_of(resolve_model(str(tiny_model)), "sdxl")


@pytest.mark.parametrize("name", ["", "no/such/folder", "./missing", "/missing"])
def test_a_missing_folder(name: str) -> None:
    with pytest.raises(ModelError, match="no such model"):
        resolve_model(name)


def test_a_single_file_says_how_to_convert_it(tmp_path: Path) -> None:
    path = tmp_path / "v1-5.safetensors"
    path.write_bytes(b"")
    with pytest.raises(ModelError, match="from_single_file"):
        resolve_model(str(path))


def test_offline_is_a_clear_error() -> None:
    with pytest.raises(ModelError) as error:
        resolve_model("nobody/never-downloaded")
    assert "cannot be reached" in str(error.value)
    assert "HF_HUB_OFFLINE" in str(error.value)


def test_a_hub_id_is_resolved_to_a_commit_first(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "a" * 40
    asked: dict[str, object] = {}

    def download(repository: str, *, revision: str, allow_patterns: list[str]) -> str:
        asked.update(revision=revision, patterns=allow_patterns)
        return str(tiny_model)

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    files = [SimpleNamespace(rfilename=name) for name in ("model_index.json", "unet/config.json", "unet/evil.py")]
    found = SimpleNamespace(sha=commit, siblings=files)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision: found)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve_model("owner/name", "main")
    assert source.revision == commit
    assert asked["revision"] == commit
    assert asked["patterns"] == ["model_index.json", "unet/config.json"]


def test_one_set_of_weights_is_downloaded() -> None:
    """A repository laid out as SD 1.5's: every variant and single-file checkpoints beside the components."""
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.fp16.safetensors",
    ]
    unwanted = [
        ".gitattributes",
        "README.md",
        "v1-5-pruned.safetensors",
        "v1-5-pruned.ckpt",
        "safety_checker/model.safetensors",
        "feature_extractor/preprocessor_config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/pytorch_model.bin",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
    ]
    assert select_files(sorted(wanted + unwanted)) == wanted


def test_shards_count_as_plain_weights() -> None:
    shards = [f"unet/diffusion_pytorch_model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    half = "unet/diffusion_pytorch_model.fp16.safetensors"
    assert select_files([*shards, half]) == shards
    assert select_files([half]) == [half]
