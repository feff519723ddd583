"""Where a model comes from: folders, hub ids, and what is refused before anything is run."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest

from toolchain.errors import ModelError
from toolchain.models import family_of, resolve_model


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
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda self, name, revision: SimpleNamespace(sha=commit))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    source = resolve_model("owner/name", "main")
    assert source.revision == commit
    assert asked["revision"] == commit
    assert not any(p.endswith((".py", ".bin", ".pt", ".ckpt")) for p in asked["patterns"])  # type: ignore[attr-defined]
