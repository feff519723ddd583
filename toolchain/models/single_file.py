"""A checkpoint in one file, as A1111 and ComfyUI keep it -> a diffusers folder, by diffusers' own converter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from toolchain.errors import ModelError, first_line
from toolchain.models.source import ModelSource
from toolchain.sampler.silence import quiet
from toolchain.weights.mapped import read_header

INCOMPLETE = "a network of which it lacks tensors"


def repository_of(checkpoint: Path) -> str:
    """The hub repository whose configs diffusers takes for a checkpoint, by the names and shapes of its tensors."""
    from diffusers.loaders.single_file_utils import fetch_diffusers_config

    shapes = {key: SimpleNamespace(shape=ref.shape) for key, ref in read_header(checkpoint).items()}
    return str(fetch_diffusers_config(shapes)["pretrained_model_name_or_path"])


def convert(checkpoint: Path, config: ModelSource, pipeline: str, out: Path) -> None:
    """Writes `checkpoint` as a folder of the class `pipeline`, its tensors in their own types.

    config  a diffusers folder: configs, scheduler and tokenizers come from it, and text encoders that the file has not

    ModelError where the file holds another model than the configs describe, or not all of it.
    """
    import diffusers

    try:
        with quiet_libraries():
            converted = getattr(diffusers, pipeline).from_single_file(
                str(checkpoint), config=str(config.path), local_files_only=True
            )
            _require_whole(converted.components)
            converted.save_pretrained(out)
    except Exception as error:  # the converter looks up keys and shapes, and raises whatever that raises
        raise ModelError(
            f"diffusers cannot convert the single file to a {pipeline}",
            where=checkpoint,
            expected=f"the model that {config.name} describes, all of it",
            got=INCOMPLETE if "meta tensor" in str(error) else f"{type(error).__name__}: {first_line(error)}",
            hint="give a diffusers folder of the same kind of model as --config; where the file lacks a VAE or a text "
            "encoder, put the pipeline together with diffusers, save_pretrained(FOLDER), and give --model FOLDER",
        ) from error


def _require_whole(components: Mapping[str, Any]) -> None:
    """ValueError for a network that the checkpoint holds in part: the converter leaves the rest without values."""
    for name, part in components.items():
        if not hasattr(part, "named_parameters"):
            continue
        if hasattr(part, "tie_weights"):  # T5's embedding has two names, and a file may have one (diffusers 0.42)
            part.tie_weights()
        lacking = [key for key, parameter in part.named_parameters() if parameter.is_meta]
        if lacking:
            raise ValueError(f"it lacks {len(lacking)} tensors of the {name}, {lacking[0]} for one")


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Without the libraries' progress bars and advice."""
    import diffusers.utils.logging
    import transformers.utils.logging

    loggers = [m for m in (diffusers.utils.logging, transformers.utils.logging) if m.is_progress_bar_enabled()]
    for logger in loggers:
        logger.disable_progress_bar()
    verbosity = transformers.utils.logging.get_verbosity()
    transformers.utils.logging.set_verbosity_error()
    try:
        with quiet():
            yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        for logger in loggers:
            logger.enable_progress_bar()
