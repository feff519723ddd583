"""CLIP scores: how well a picture fits its prompt, by a CLIP model in a folder of the user. Nothing is downloaded."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.check.report import Picture
from toolchain.errors import ModelError
from toolchain.models.safety import MEAN, STD
from toolchain.models.single_file import quiet_libraries
from toolchain.runtime.safety import prepare
from toolchain.settings import SafetyInput

if TYPE_CHECKING:
    from numpy.typing import NDArray

FILES = ("config.json", "model.safetensors", "tokenizer_config.json")


def require_clip(folder: Path) -> None:
    """ModelError for a folder that is no CLIP model of transformers with its tokenizer: asked before hours of work."""
    missing = [name for name in FILES if not (folder / name).is_file()]
    kind = None if missing else _json(folder / FILES[0]).get("model_type")
    if missing or kind != "clip":
        raise ModelError(
            "the folder for CLIP scores is no CLIP model of transformers",
            where=folder,
            expected=f'{", ".join(FILES)}, and "model_type": "clip" in the first',
            got=f"no {', '.join(missing)}" if missing else f"model_type {kind!r}",
            hint="hf download openai/clip-vit-base-patch32 --local-dir clip",
        )


def score_pictures(folder: Path, pictures: Sequence[Picture], progress: Callable[[str], None]) -> list[Picture]:
    """The pictures with their scores, the reference's and the compiled one's: 100 times the cosine of picture and
    prompt. ModelError where the model cannot be loaded."""
    import torch
    from transformers import CLIPModel, CLIPTokenizerFast

    progress("CLIP scores: loading the model")
    try:
        with quiet_libraries():
            model = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True).float().eval()
            tokenizer = CLIPTokenizerFast.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError("the model for CLIP scores cannot be loaded", where=folder, got=error) from error
    side = model.config.vision_config.image_size
    shape = SafetyInput(side, side, MEAN, STD)
    length = model.config.text_config.max_position_embeddings

    def image(pixels: NDArray[Any]) -> Any:
        outputs = model.vision_model(pixel_values=torch.from_numpy(prepare(pixels, shape)))
        return model.visual_projection(outputs.pooler_output)[0]

    def text(prompt: str) -> Any:
        tokens = tokenizer(prompt, truncation=True, max_length=length, return_tensors="pt")
        return model.text_projection(model.text_model(**tokens).pooler_output)[0]

    def score(pixels: NDArray[Any], wanted: Any) -> float:
        return 100 * float(torch.nn.functional.cosine_similarity(image(pixels), wanted, dim=0))

    scored = []
    with torch.inference_mode():
        prompts = {picture.prompt: text(picture.prompt) for picture in pictures}
        for number, picture in enumerate(pictures):
            progress(f"CLIP scores: {number + 1} of {len(pictures)}")
            pair, wanted = picture.pixels, prompts[picture.prompt]
            assert pair is not None, "a picture that was just drawn"
            scores = (score(pair.reference, wanted), score(pair.compiled, wanted))
            scored.append(replace(picture, clip=scores))
    return scored


def _json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError("the config for CLIP scores cannot be read", where=path, got=error) from error
    return data if isinstance(data, dict) else {}
