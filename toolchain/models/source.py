"""Where a model comes from: a local diffusers folder, or a hub repository resolved to one commit."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError, UsageError

# Parts of a repository that nothing here compiles: a safety checker alone is 1.2 GB.
UNUSED_FOLDERS = ("safety_checker", "feature_extractor", "image_encoder")
VARIANT = re.compile(r"(?P<stem>.+)\.(fp16|bf16|non_ema|ema_only)(?P<rest>(-\d+-of-\d+)?\.safetensors(\.index\.json)?)")
LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class ModelSource:
    """A diffusers model on disk. `name` is what the user asked for, `revision` the hub commit it came from."""

    path: Path
    name: str
    revision: str | None

    @cached_property
    def index(self) -> dict[str, Any]:
        """model_index.json."""
        return self._json(self.path / "model_index.json")

    def config(self, folder: str) -> dict[str, Any]:
        """The config of one component; the scheduler's and the tokenizer's have names of their own."""
        names = {"scheduler": "scheduler_config.json", "tokenizer": "tokenizer_config.json"}
        return self._json(self.path / folder / names.get(folder, "config.json"))

    def setting(self, folder: str, key: str) -> Any:
        """One entry of a component's config; ModelError where it is missing."""
        config = self.config(folder)
        if key not in config:
            where = self.path / folder / "config.json"
            raise ModelError("the config lacks a setting", where=where, expected=key, hint="download the folder again")
        return config[key]

    @property
    def variant(self) -> str | None:
        """ "fp16" where that is all there is: diffusers and transformers must be told to load it."""
        weights = {f.name for f in self.path.glob("*/*.safetensors")}
        return "fp16" if weights and all(".fp16" in name for name in weights) else None

    def has_weights(self, folder: str) -> bool:
        return any((self.path / folder).glob("*.safetensors"))

    def class_of(self, folder: str) -> str:
        """The class that model_index.json gives a component; ModelError when absent or from a foreign library."""
        entry = self.index.get(folder)
        if not (isinstance(entry, list) and len(entry) == 2 and all(isinstance(e, str) for e in entry)):
            raise ModelError(
                f"the model has no {folder}",
                where=self.path / "model_index.json",
                expected=f'"{folder}": ["library", "Class"]',
                got=json.dumps(entry),
            )
        library, name = entry
        if library not in LIBRARIES:
            raise ModelError(
                f"the {folder} needs code from outside diffusers and transformers, which is not run",
                where=self.path / "model_index.json",
                expected=" or ".join(LIBRARIES),
                got=library,
                hint="convert the model to the library's own classes, or drop the component",
            )
        return str(name)

    def _json(self, path: Path) -> dict[str, Any]:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise ModelError(
                f"{path.name} is missing from the model",
                where=path,
                hint="a diffusers folder holds model_index.json and one folder per component; download it again",
            ) from None
        except (OSError, ValueError) as error:
            raise ModelError(f"{path.name} cannot be read", where=path, expected="a JSON object", got=error) from error
        if not isinstance(data, dict):
            raise ModelError(f"{path.name} is not a JSON object", where=path, got=type(data).__name__)
        return data


def resolve_model(model: str, revision: str | None = None) -> ModelSource:
    """A local folder as it is; anything shaped like `owner/name` from the hub, pinned to a commit.

    Raises ModelError for a missing folder, a single-file checkpoint, remote code, or an unreachable hub.
    """
    path = Path(model).expanduser()
    if revision is not None and path.exists():
        raise UsageError("a revision belongs to a hub id, and the model is a local path", where=path, got=revision)
    if model and path.is_dir():
        source = ModelSource(path.resolve(), model, None)
    elif path.is_file():
        raise ModelError(
            "the model is a single file",
            where=path,
            expected="a diffusers folder with model_index.json",
            hint="convert it once: StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)",
        )
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", model) and not model.startswith((".", "/")):
        source = _from_hub(model, revision)
    else:
        raise ModelError(
            "no such model",
            where=model,
            expected="a diffusers folder, or a hub id such as owner/name",
            hint="check --model",
        )
    _refuse_remote_code(source)
    return source


def _refuse_remote_code(source: ModelSource) -> None:
    if not isinstance(source.index.get("_class_name"), str):
        raise ModelError(
            "the model asks for a pipeline class of its own code, which is not run",
            where=source.path / "model_index.json",
            expected='"_class_name": a diffusers class',
            got=json.dumps(source.index.get("_class_name")),
        )


def _from_hub(repository: str, revision: str | None) -> ModelSource:
    # The commit is looked up first and everything is downloaded at that commit: resolving a branch twice lets the
    # files change in between (CVE-2026-45804).
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, RepositoryNotFoundError

    try:
        if constants.is_offline_mode():
            folder = snapshot_download(repository, revision=revision, local_files_only=True)
            return ModelSource(Path(folder), repository, Path(folder).name)
        found = HfApi().model_info(repository, revision=revision)
        commit = found.sha
        files = select_files([f.rfilename for f in found.siblings or []])
        folder = snapshot_download(repository, revision=commit, allow_patterns=files)
    except RepositoryNotFoundError:
        raise ModelError(
            "neither a local folder nor a repository on the hub",
            where=repository,
            hint="check the spelling; for a private or gated repository run: hf auth login",
        ) from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise ModelError(
            "the model is not on this machine and the hub cannot be reached",
            where=repository,
            got=str(error).splitlines()[0] if str(error) else type(error).__name__,
            hint="connect to the network, unset HF_HUB_OFFLINE, or give a local diffusers folder as --model",
        ) from error
    return ModelSource(Path(folder), repository, commit)


def select_files(names: list[str]) -> list[str]:
    """What of a repository is downloaded: json, tokenizer text and one set of safetensors per component.

    Single-file checkpoints at the top, pickles, code, and variants of weights that are there in full are left alone.
    """
    chosen = []
    for name in names:
        folder, _, file = name.rpartition("/")
        if (not folder and file != "model_index.json") or "/" in folder or folder in UNUSED_FOLDERS:
            continue
        variant = VARIANT.fullmatch(name)
        if variant and any(_is_plain(other, variant["stem"]) for other in names):
            continue
        if file.endswith((".json", ".safetensors", ".txt")):
            chosen.append(name)
    return chosen


def _is_plain(name: str, stem: str) -> bool:
    return re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None
