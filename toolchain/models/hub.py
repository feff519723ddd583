"""Where a model comes from: a local diffusers folder, or a hub repository resolved to one commit."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path

from toolchain.errors import ModelError, UsageError, first_line
from toolchain.models.source import ModelSource

# Parts of a repository that nothing here compiles unless it is asked to: a safety checker alone is 1.2 GB.
SAFETY_FOLDERS = ("safety_checker", "feature_extractor")
UNUSED_FOLDERS = (*SAFETY_FOLDERS, "image_encoder", "controlnet", "adapter")
VARIANT = re.compile(r"(?P<stem>.+)\.(fp16|bf16|non_ema|ema_only)(?P<rest>(-\d+-of-\d+)?\.safetensors(\.index\.json)?)")

HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+")

log = logging.getLogger("toolchain")


def resolve_model(
    model: str, revision: str | None = None, *, weights: bool = True, safety: bool = False
) -> ModelSource:
    """A local folder unchanged, or a hub id such as `owner/name`, downloaded at a pinned commit.

    weights  False where the configs are enough: the weights are not downloaded then
    safety   whether the safety checker is wanted, which is not downloaded otherwise

    Raises ModelError for a missing folder or repository, remote code, or an unreachable hub.
    """
    path = Path(model).expanduser()
    if revision is not None and path.exists():
        raise UsageError("a revision belongs to a hub id, and the model is a local path", where=path, got=revision)
    if model and path.is_dir():
        source = ModelSource(path.resolve(), model, None)
    elif _is_plainly_a_path(model):
        raise _no_such_path(model)
    elif HUB_ID.fullmatch(model):
        try:
            source = _from_hub(model, revision, weights, safety)
        except _NotFoundError as error:
            if path.parent.is_dir():  # models/sd15 beside a folder models: a path with a typo, more likely
                raise _no_such_path(model, f"as a hub id: {error.what}") from error
            raise
    else:
        raise ModelError(
            "no such model",
            where=model,
            expected="a diffusers folder, or a hub id such as owner/name",
            hint="check --model",
        )
    _refuse_remote_code(source)
    return source


def _is_plainly_a_path(model: str) -> bool:
    """Whether this cannot be a hub id; models/sd15 can, also beside a folder models."""
    return (
        model.startswith(("/", "./", "../", "~"))
        or model.endswith(("/", ".safetensors"))
        or model.count("/") > 1
        or Path(model).is_absolute()
    )


class _NotFoundError(ModelError):
    """Neither on the hub nor in its cache."""


def _no_such_path(model: str, got: str | None = None) -> ModelError:
    path = Path(model).expanduser()
    expected = "a diffusers folder, or a .safetensors file"
    hint = "check the spelling" + ("" if path.parent.is_dir() else f"; there is no folder {path.parent} either")
    return ModelError("no such folder or file", where=path, expected=expected, got=got, hint=hint)


def _refuse_remote_code(source: ModelSource) -> None:
    if not isinstance(source.index.get("_class_name"), str):
        raise ModelError(
            "the model asks for a pipeline class of its own code, which is not run",
            where=source.path / "model_index.json",
            expected='"_class_name": a diffusers class',
            got=json.dumps(source.index.get("_class_name")),
        )


def _from_hub(repository: str, revision: str | None, weights: bool, safety: bool) -> ModelSource:
    # The commit is looked up first and everything is downloaded at that commit: resolving a branch twice lets the
    # files change in between (CVE-2026-45804).
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    if constants.is_offline_mode():
        return _from_cache(repository, revision, None)
    try:
        info = HfApi().model_info(repository, revision=revision)
    except HFValidationError as error:
        raise _not_an_id(repository, error) from None
    except RevisionNotFoundError:
        raise ModelError(
            "the repository has no such revision",
            where=repository,
            expected="a branch, a tag or a whole commit hash",
            got=revision,
            hint="check --revision",
        ) from None
    except RepositoryNotFoundError:
        raise _not_found(repository) from None
    except Exception as error:  # the transport's own classes differ between releases of the hub's client
        source = _from_cache(repository, revision, error)
        message = "the hub cannot be reached (%s); using the copy of %s on this machine, commit %s"
        log.warning(message, first_line(error), repository, source.revision)
        return source
    commit = info.sha
    files = select_files([f.rfilename for f in info.siblings or []], weights, safety)
    try:
        folder = Path(snapshot_download(repository, revision=commit, allow_patterns=files))
    except RepositoryNotFoundError:  # gated: everyone may look it up
        raise _not_found(repository) from None
    except Exception as error:  # as above, and whatever the disk says
        raise ModelError(
            "the model cannot be downloaded",
            where=repository,
            got=first_line(error),
            hint="check the connection and the space on the disk; what is there already is not downloaded again",
        ) from error
    _remember(folder, revision or constants.DEFAULT_REVISION, commit)
    return ModelSource(folder, repository, commit)


def _from_cache(repository: str, revision: str | None, reason: Exception | None) -> ModelSource:
    """What an earlier download left. `reason`: why the hub cannot be asked; None where it must not be."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    try:
        folder = snapshot_download(repository, revision=revision, local_files_only=True)
    except HFValidationError as error:
        raise _not_an_id(repository, error) from None
    except OSError as error:
        # The client calls a copy incomplete that lacks what is left out on purpose; it says where the copy is.
        folder = getattr(error, "snapshot_path", "")
        if not folder:
            raise _NotFoundError(
                "the model is not on this machine and the hub cannot be reached",
                where=repository,
                got=first_line(reason or error),
                hint="connect to the network, unset HF_HUB_OFFLINE, or give a local diffusers folder as --model",
            ) from error
    return ModelSource(Path(folder), repository, Path(folder).name)


def _not_found(repository: str) -> ModelError:
    return _NotFoundError(
        "neither a local folder nor a repository on the hub",
        where=repository,
        hint="check the spelling; for a private or gated repository run: hf auth login",
    )


def _not_an_id(repository: str, error: Exception) -> ModelError:
    return _NotFoundError(
        "neither a local folder nor a name that the hub allows",
        where=repository,
        expected="a diffusers folder, or a hub id such as owner/name",
        got=first_line(error),
        hint="check --model",
    )


def _remember(folder: Path, revision: str, commit: str | None) -> None:
    """Notes which commit a branch or tag was, which the client does not do for a download by commit.

    Without it the copy cannot be found again when the hub cannot be reached.
    """
    if commit is None or revision == commit or folder.name != commit:
        return
    path = folder.parents[1] / "refs" / revision
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(commit)
    except OSError as error:
        log.debug("%s cannot be written: %s", path, error)


def select_files(names: list[str], weights: bool = True, safety: bool = False) -> list[str]:
    """What of a repository is downloaded: json, tokenizer text and one set of safetensors per component, if wanted.

    Single-file checkpoints at the top, pickles, code, and variants of weights that are there in full are left alone.
    """
    chosen = []
    unused = [folder for folder in UNUSED_FOLDERS if not (safety and folder in SAFETY_FOLDERS)]
    for name in names:
        folder, _, file = name.rpartition("/")
        if (not folder and file != "model_index.json") or "/" in folder or folder in unused:
            continue
        variant = VARIANT.fullmatch(name)
        if variant and any(_is_plain(other, variant["stem"]) for other in names):
            continue
        if not weights and file.endswith((".safetensors", ".safetensors.index.json")):
            continue
        if file.endswith((".json", ".safetensors", ".txt", ".model")):
            chosen.append(name)
    return chosen


def _is_plain(name: str, stem: str) -> bool:
    return re.fullmatch(re.escape(stem) + r"(-\d+-of-\d+)?\.safetensors(\.index\.json)?", name) is not None
