"""Where a command's model comes from: a folder, the hub, or one file that is converted into the store first."""

from __future__ import annotations

import logging
from pathlib import Path

from toolchain.builder import stages
from toolchain.builder.steps import code_digest, tool_versions
from toolchain.errors import ModelError, UsageError
from toolchain.models.hub import UNUSED_FOLDERS, resolve_model
from toolchain.models.registry import family_for
from toolchain.models.source import ModelSource
from toolchain.store.artifacts import Json, Store, default_store
from toolchain.weights.mapped import NOT_QUANTIZED, read_header, require_plain

log = logging.getLogger("toolchain")

CONFIGS = (".json", ".txt", ".model")
TOOLS = ("diffusers", "transformers", "torch")


def open_model(
    model: str | Path,
    revision: str | None = None,
    *,
    config: str | Path | None = None,
    store: str | Path | None = None,
    weights: bool = True,
    safety: bool = False,
) -> ModelSource:
    """`resolve_model`, and a checkpoint in one file: that becomes a diffusers folder, an artifact of the
    store.

    config   of a single file: a diffusers folder or a hub id, for what the file does not say. None takes the
             repository that diffusers takes for such a file
    weights  False where the configs are enough
    safety   whether a hub's safety checker is wanted

    Raises what `resolve_model` raises, UsageError for a `config` beside a folder, ModelError for a file that is no
    plain safetensors file or that diffusers cannot convert.
    """
    path = Path(model).expanduser()
    if not path.is_file():
        if config is not None:
            got = f"--model {model}"
            raise UsageError("a config is for a model in a single file", expected="a .safetensors file", got=got)
        return resolve_model(str(model), revision, weights=weights, safety=safety)
    if revision is not None:
        raise UsageError("a revision belongs to a hub id, and the model is a local path", where=path, got=revision)
    _require_safetensors(path)
    require_plain(read_header(path), path)
    configs = _configs(path, config)
    family = family_for(configs)
    if not weights:
        return ModelSource(configs.path, str(model), None)
    artifacts = Store(Path(store or default_store()))
    inputs: dict[str, Json] = {
        "code": code_digest("builder.stages.model"),
        "checkpoint": artifacts.digest_of(path),
        "config": {f.relative_to(configs.path).as_posix(): artifacts.digest_of(f) for f in _used(configs.path)},
        "pipeline": family.pipeline,
        "tools": tool_versions(TOOLS),
    }

    def build(out: Path) -> None:
        log.warning("%s is converted once, with the configs of %s", path, configs.name)
        stages.model.write(path, configs, family.pipeline, out)

    artifact, _ = artifacts.get_or_build("model", path.stem, inputs, build)
    return ModelSource(artifact.path, str(model), None)


def _require_safetensors(path: Path) -> None:
    if path.suffix == ".gguf":
        what = "the weights are quantised (GGUF), which is not supported"
        raise ModelError(what, where=path, expected="a .safetensors file", hint=NOT_QUANTIZED)
    if path.suffix != ".safetensors":
        raise ModelError(
            "the model is a single file of a kind that is not opened: a pickle can run code",
            where=path,
            expected="a .safetensors file, or a diffusers folder with model_index.json",
            hint="where you trust it, convert it once: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)",
        )


def _configs(path: Path, config: str | Path | None) -> ModelSource:
    if config is not None:
        return resolve_model(str(config), weights=False)
    from toolchain.models.single_file import repository_of

    repository = repository_of(path)
    try:
        return resolve_model(repository, weights=False)
    except ModelError as error:
        raise ModelError(
            f"the configs for a model in a single file cannot be had: {error.what}",
            where=path,
            expected=f"the hub's {repository}, which diffusers takes for this file",
            got=error.got,
            hint="without a network give a diffusers folder of the same kind of model: --config DIR",
        ) from error


def _used(folder: Path) -> list[Path]:
    """What the converter reads in a folder of configs: text encoders' weights too, which a file may not have."""
    parts = [folder, *(p for p in folder.iterdir() if p.is_dir() and p.name not in UNUSED_FOLDERS)]
    files = [f for part in parts for f in part.iterdir() if f.is_file()]
    encoders = [f for f in files if f.suffix == ".safetensors" and f.parent.name.startswith("text_encoder")]
    return sorted([*(f for f in files if f.suffix in CONFIGS), *encoders])
