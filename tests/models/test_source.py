"""Where a model comes from: folders, hub ids, and what is refused before anything is run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError, RevisionNotFoundError

from tests.tiny import recipe_for
from toolchain.errors import ModelError
from toolchain.models.hub import resolve_model, select_files
from toolchain.models.registry import MODELS, family_of
from toolchain.models.source import ModelSource


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_folder_is_taken_as_it_is(tiny_model: Path) -> None:
    source = resolve_model(str(tiny_model))
    assert source.path == tiny_model.resolve()
    assert source.revision is None
    assert family_of(source, recipe_for()).name == "sd"


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
    ("unet/config.json", {"num_class_embeds": 10}, "class-conditional"),
    ("unet/config.json", {"cross_attention_dim": 1024}, "the text encoder does not fit the UNet"),
    ("unet/config.json", {"cross_attention_dim": [32, 64]}, "the text encoder does not fit the UNet"),
    ("model_index.json", {"scheduler": ["my_scheduler", "Mine"]}, "outside diffusers and transformers"),
    ("text_encoder/config.json", {"attn_implementation": "owner/kernel"}, "attn_implementation = 'owner/kernel'"),
    ("text_encoder/config.json", {"_attn_implementation_internal": "owner/kernel"}, "code of its own"),
    (
        "text_encoder/config.json",
        {"attn_implementation": {"": "sdpa", "text_config": "owner/kernel"}},
        "code of its own",
    ),
    ("text_encoder/config.json", {"text_config": {"_attn_implementation": {"": "o/k"}}}, "text_config._attn_impl"),
    ("unet/config.json", {"auto_map": {"AutoModel": "mine.UNet"}}, "the unet's config asks for code"),
    ("vae/config.json", {"auto_map": {"AutoModel": "mine.VAE"}}, "the vae's config asks for code"),
    (
        "unet/config.json",
        {"quantization_config": {"quant_method": "bitsandbytes", "bnb_4bit_quant_type": "nf4"}},
        "unet",
    ),
    ("vae/config.json", {"quantization_config": {"quant_method": "gguf"}}, "quant_method = 'gguf'"),
    ("text_encoder/config.json", {"quantization_config": {"quant_method": "quanto"}}, "text_encoder is quantised"),
    ("text_encoder/config.json", {"hidden_size": "wide"}, "hidden_size is not a size"),
    ("vae/config.json", {"block_out_channels": 4}, "block_out_channels is not a list"),
    ("vae/config.json", {"out_channels": 1}, "out_channels = 3"),
    ("vae/config.json", {"scaling_factor": "large"}, "does not say how latents are scaled"),
    ("unet/config.json", {"out_channels": 8}, "the UNet's output has other channels than its input"),
    ("tokenizer/tokenizer_config.json", {"padding_side": "left"}, "unsupported padding_side"),
    ("tokenizer/tokenizer_config.json", {"truncation_side": "left"}, "unsupported truncation_side"),
    ("tokenizer/tokenizer_config.json", {"model_max_length": 77}, "max_position_embeddings of text_encoder"),
]


@pytest.mark.parametrize(("file", "changes", "message"), BAD_MODELS)
def test_unsupported_models(tiny_copy: Path, file: str, changes: dict[str, object], message: str) -> None:
    edit(tiny_copy / file, **changes)
    with pytest.raises(ModelError) as error:
        family_of(resolve_model(str(tiny_copy)), recipe_for())
    assert message in str(error.value)


@pytest.mark.parametrize("value", ["sdpa", "eager", {"": "eager", "text_config": "sdpa"}, None])
def test_attention_of_the_library_s_own_is_no_code(tiny_copy: Path, value: object) -> None:
    edit(tiny_copy / "text_encoder/config.json", attn_implementation=value)
    edit(tiny_copy / "vae/config.json", attn_implementation="eager")
    family_of(resolve_model(str(tiny_copy)), recipe_for())


def test_the_width_of_the_context_may_be_a_list(tiny_copy: Path) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    component = MODELS["sd"].component("denoiser")
    source = resolve_model(str(tiny_copy))
    with FakeTensorMode(allow_non_fake_inputs=True):
        plain = component.module(source, recipe_for()).state_dict()
        edit(tiny_copy / "unet/config.json", cross_attention_dim=[32, 32])
        listed = component.module(source, recipe_for()).state_dict()
    family_of(source, recipe_for())
    assert {k: v.shape for k, v in listed.items()} == {k: v.shape for k, v in plain.items()}


def test_a_flag_of_older_configs_names_no_code(tiny_copy: Path) -> None:
    edit(tiny_copy / "text_encoder/config.json", _attn_implementation_autoset=True)
    family_of(resolve_model(str(tiny_copy)), recipe_for())


def test_only_a_model_with_weights_needs_its_tokenizer(tiny_copy: Path) -> None:
    (tiny_copy / "tokenizer").rename(tiny_copy / "elsewhere")
    with pytest.raises(ModelError, match="the tokenizer is incomplete"):
        family_of(resolve_model(str(tiny_copy)), recipe_for())
    for weights in tiny_copy.glob("*/*.safetensors"):
        weights.unlink()
    family_of(resolve_model(str(tiny_copy)), recipe_for())


VARIANTS = [
    (["model.safetensors", "model.fp16.safetensors"], None),
    (["model.fp16.safetensors"], "fp16"),
    (["model.ema_only.safetensors"], "ema_only"),
    (["model.fp16-00001-of-00002.safetensors", "model.fp16-00002-of-00002.safetensors"], "fp16"),
    (["model-00001-of-00002.fp16.safetensors"], "fp16"),
    (["model-00001-of-00002.safetensors"], None),
    ([], None),
]


@pytest.mark.parametrize(("names", "variant"), VARIANTS)
def test_the_variant_is_each_component_s_own(tmp_path: Path, names: list[str], variant: str | None) -> None:
    for folder in ("unet", "vae"):
        (tmp_path / folder).mkdir()
    for name in names:
        (tmp_path / "unet" / name).write_bytes(b"")
    (tmp_path / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    source = ModelSource(tmp_path, "mine", None)
    assert (source.variant("unet"), source.variant("vae")) == (variant, None)


def test_a_recipe_of_another_family(tiny_model: Path) -> None:
    with pytest.raises(ModelError, match="unknown family"):
        family_of(resolve_model(str(tiny_model)), recipe_for(family="sd9"))


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("", "no such model"),
        *((path, "no such folder or file") for path in ("no/such/folder", "./missing", "/missing", "~/missing/model")),
    ],
)
def test_a_missing_folder(name: str, what: str) -> None:
    with pytest.raises(ModelError, match=what):
        resolve_model(name)


def test_a_hub_id_beside_a_folder_of_its_owner_is_looked_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only what is nowhere is called a path with a typo."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    with pytest.raises(ModelError, match="no such folder or file") as error:
        resolve_model("owner/name")
    assert "as a hub id: the model is not on this machine" in str(error.value)
    source = ModelSource(tmp_path, "owner/name", "c0ffee")
    (tmp_path / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    monkeypatch.setattr("toolchain.models.hub._from_hub", lambda *_: source)
    assert resolve_model("owner/name") is source


def test_offline_is_a_clear_error() -> None:
    with pytest.raises(ModelError) as error:
        resolve_model("nobody/never-downloaded")
    assert "cannot be reached" in str(error.value)
    assert "HF_HUB_OFFLINE" in str(error.value)


COMMIT = "a" * 40


class Hub:
    """Stands in for the hub's client. `fails` is raised by look-ups, `stored` is what was downloaded before."""

    def __init__(self, model: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.model, self.cache = model, cache
        self.fails: Exception | None = None
        self.asked: list[dict[str, object]] = []
        monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
        monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda _, name, revision: self.look_up())
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def look_up(self) -> SimpleNamespace:
        if self.fails:
            raise self.fails
        names = [p.relative_to(self.model).as_posix() for p in self.model.rglob("*.*")]
        return SimpleNamespace(sha=COMMIT, siblings=[SimpleNamespace(rfilename=name) for name in [*names, "unet/a.py"]])

    def download(self, repository: str, **options: object) -> str:
        self.asked.append({"repository": repository, **options})
        folder = self.cache / "snapshots" / COMMIT
        if options.get("local_files_only"):
            ref = self.cache / "refs" / str(options["revision"] or "main")
            if not ref.exists():
                raise LocalEntryNotFoundError("not cached")
            error = LocalEntryNotFoundError("incomplete")
            error.snapshot_path = str(self.cache / "snapshots" / ref.read_text())  # type: ignore[attr-defined]
            raise error
        shutil.copytree(self.model, folder)
        return str(folder)


@pytest.fixture
def hub(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    return Hub(tiny_model, tmp_path / "models--owner--name", monkeypatch)


@pytest.mark.parametrize("weights", [True, False])
def test_a_hub_id_is_resolved_to_a_commit_first(hub: Hub, weights: bool) -> None:
    source = resolve_model("owner/name", "main", weights=weights)
    assert source.revision == COMMIT
    (asked,) = hub.asked
    assert asked["revision"] == COMMIT
    patterns = asked["allow_patterns"]
    assert isinstance(patterns, list)
    assert {"model_index.json", "unet/config.json", "tokenizer/merges.txt"} <= set(patterns)
    assert not any(name.endswith(".py") for name in patterns)
    assert any(name.endswith(".safetensors") for name in patterns) is weights


class TransportError(Exception):
    """As httpx's: no OSError."""


@pytest.mark.parametrize("revision", [None, "v1"])
def test_an_unreachable_hub_gives_what_was_downloaded(
    hub: Hub, revision: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    resolve_model("owner/name", revision)
    hub.fails = TransportError("name resolution failed\nadvice")
    with caplog.at_level(logging.WARNING, "toolchain"):
        source = resolve_model("owner/name", revision)
    assert source.revision == COMMIT
    assert COMMIT in caplog.text
    assert "name resolution failed" in caplog.text
    with pytest.raises(ModelError, match="cannot be reached") as error:
        resolve_model("owner/name", "never-downloaded")
    assert "name resolution failed" in str(error.value)


def test_errors_of_the_hub_say_what_is_wrong(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.fails = RevisionNotFoundError("404", response=SimpleNamespace(headers={}, request=None))  # type: ignore[arg-type]
    with pytest.raises(ModelError, match="no such revision"):
        resolve_model("owner/name", "v9")
    hub.fails = HFValidationError("Repo id must not end with '.git'")
    with pytest.raises(ModelError, match=r"a name that the hub allows[\s\S]*must not end"):
        resolve_model("owner/name.git")
    hub.fails = None

    def full(*_: object, **__: object) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    with pytest.raises(ModelError, match=r"cannot be downloaded[\s\S]*No space left"):
        resolve_model("owner/name")


def test_a_name_that_the_hub_forbids_is_told_offline_too() -> None:
    with pytest.raises(ModelError, match="a name that the hub allows"):
        resolve_model("owner/name.git")


def test_one_set_of_weights_is_downloaded() -> None:
    """A repository laid out as SD 1.5's: every variant and single-file checkpoints beside the components."""
    wanted = [
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/vocab.json",
        "tokenizer_3/spiece.model",
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
    assert select_files([*shards, f"{half}.index.json", "unet/config.json"], weights=False) == ["unet/config.json"]
