"""Where `generate` writes its pictures, and what it writes into them beside the pixels."""

from __future__ import annotations

import io
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import UsageError

if TYPE_CHECKING:
    from PIL import Image

    from toolchain.runtime.pipeline import Pipeline
    from toolchain.runtime.progress import Callback
    from toolchain.runtime.result import Result


@dataclass(frozen=True)
class Drawn:
    """Pictures, and the settings that each was drawn with."""

    result: Result
    settings: list[dict[str, Any]]


def draw(pipe: Pipeline, request: Mapping[str, Any], shown: Callback) -> Drawn:
    """Calls the pipeline with the options of `generate`, by their names there. Raises RequestError."""
    wanted = {k: v for k, v in request.items() if v is not None and k not in ("prompts", "image")}
    if request.get("image"):
        wanted["image"] = list(request["image"])
    result = pipe(list(request["prompts"]), callback=shown, **wanted)
    ran = result.request
    common = {"steps": ran.steps, "scheduler": ran.scheduler, "guidance": ran.guidance}
    # What is not at its default is part of how a picture was made.
    names = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "guidance_rescale")
    common |= {k: wanted[k] for k in (*names, "clip_skip", "strength") if wanted.get(k)}
    common |= {"true_cfg": ran.true_cfg} if ran.true_cfg > 1 else {}
    own = zip(ran.prompts, ran.negatives or [""] * len(ran.prompts), ran.seeds, strict=True)
    return Drawn(result, [{"prompt": p, "negative_prompt": n, "seed": seed, **common} for p, n, seed in own])


def save(drawn: Drawn, output: Path | None) -> list[dict[str, Any]]:
    """Writes the pictures; for each its path, its size and its settings. StoreError when the disk refuses."""
    saved: list[dict[str, Any]] = []
    paths = output_paths(output, drawn.result.seeds)
    for path, image, settings in zip(paths, drawn.result.images, drawn.settings, strict=True):
        write_png(image, path, settings)
        flagged = {"flagged": drawn.result.flagged[len(saved)]} if drawn.result.flagged else {}
        saved.append({"path": str(path), "height": image.height, "width": image.width, **settings, **flagged})
    return saved


def check_output(path: Path | None) -> None:
    """Refuses, before any work is done, a place where a file cannot be written. Raises UsageError."""
    folder = Path() if path is None else path.parent
    if path is not None and path.is_dir():
        raise UsageError("the output is a folder", where=path, expected="a file", hint=f"give {path / 'a.png'}, say")
    if path is not None and path.exists() and not path.is_file():
        # Replaced by a rename, a device or a pipe would be gone.
        raise UsageError("the output is no regular file", where=path, expected="a new or a regular file")
    if not folder.is_dir():
        raise UsageError("the folder of the output is missing", where=folder, hint=f"mkdir -p {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError("the folder of the output is not writable", where=folder, hint="choose another --output")


def check_picture_output(path: Path | None) -> None:
    """`check_output`, and that the file is to be a PNG. Raises UsageError."""
    check_output(path)
    if path is not None and path.suffix.lower() != ".png":
        raise UsageError(
            "pictures are written as PNG",
            where=path,
            expected="a name that ends in .png",
            got=path.suffix or "no suffix",
        )


def output_paths(path: Path | None, seeds: Sequence[int]) -> list[Path]:
    """A path for each picture: the given one, numbered when there are several; else a new name with the seed.

    A given path is the user's to overwrite; a default name never costs an older picture.
    """
    if path is None:
        return [_free_name(f"diffbuild-{seed}") for seed in seeds]
    if len(seeds) == 1:
        return [path]
    return [path.with_name(f"{path.stem}-{number}{path.suffix}") for number in range(1, len(seeds) + 1)]


def _free_name(stem: str) -> Path:
    path, number = Path(f"{stem}.png"), 2
    while path.exists():
        path, number = Path(f"{stem}-{number}.png"), number + 1
    return path


def write_png(image: Image.Image, path: Path, texts: Mapping[str, object]) -> None:
    """Writes a picture with its texts, whole or not at all. StoreError when the disk refuses."""
    from PIL.PngImagePlugin import PngInfo

    from toolchain.store.files import write_atomic

    info = PngInfo()
    for key, text in texts.items():
        info.add_text(key, str(text))
    data = io.BytesIO()
    image.save(data, "PNG", pnginfo=info)
    write_atomic(path, data.getvalue())
