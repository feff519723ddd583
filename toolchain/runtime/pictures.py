"""Pictures as PNG files, with the settings they were drawn with as text."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.errors import UsageError
from toolchain.store.outputs import check_output

if TYPE_CHECKING:
    from PIL import Image

    from toolchain.runtime.pipeline import Pipeline
    from toolchain.runtime.progress import Callback
    from toolchain.runtime.result import Result, Timings


@dataclass(frozen=True)
class SavedPictures:
    """What `generate` drew.

    images   for each picture its path, size in pixels and settings, and `flagged` where a safety checker ran
    load_ms  what opening the bundle took
    """

    images: list[dict[str, Any]]
    timings: Timings
    load_ms: float


def draw(
    pipe: Pipeline, prompts: Sequence[str], options: Mapping[str, Any], callback: Callback | None
) -> tuple[Result, list[dict[str, Any]]]:
    """Calls the pipeline with those options that are not None; returns its result and each picture's settings.

    Raises RequestError.
    """
    chosen = {k: v for k, v in options.items() if v is not None}
    result = pipe(list(prompts), callback=callback, **chosen)
    ran = result.request
    common = {"steps": ran.steps, "scheduler": ran.scheduler, "guidance": ran.guidance}
    # What is not at its default is part of how a picture was made.
    names = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "guidance_rescale")
    common |= {k: chosen[k] for k in (*names, "clip_skip", "strength") if chosen.get(k)}
    common |= {"true_cfg": ran.true_cfg} if ran.true_cfg > 1 else {}
    each = zip(ran.prompts, ran.negatives or [""] * len(ran.prompts), ran.seeds, strict=True)
    return result, [{"prompt": p, "negative_prompt": n, "seed": seed, **common} for p, n, seed in each]


def save(result: Result, settings: Sequence[Mapping[str, Any]], output: Path | None) -> list[dict[str, Any]]:
    """Writes the pictures; returns for each its path, its size and its settings. StoreError when the disk refuses."""
    saved: list[dict[str, Any]] = []
    for path, image, texts in zip(output_paths(output, result.seeds), result.images, settings, strict=True):
        write_png(image, path, texts)
        flagged = {"flagged": result.flagged[len(saved)]} if result.flagged else {}
        saved.append({"path": str(path), "height": image.height, "width": image.width, **texts, **flagged})
    return saved


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
