"""Prompt -> token ids, without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from toolchain.errors import BundleError, RequestError

REBUILD = "build the bundle again"
SETTINGS = ("max_length", "bos", "eos", "pad")


@dataclass(frozen=True)
class Encoded:
    """`ids` [1, max_length] int64, padded; `cut` is the end of the prompt that did not fit, "" when all did."""

    ids: npt.NDArray[np.int64]
    cut: str


class PromptTokenizer:
    """The tokenizer of a text encoder: ids equal transformers' CLIPTokenizer or T5Tokenizer, padded and cut to
    `max_length`.

    Loads what `models.tokenizers.write_tokenizer` wrote: `tokenizer.json`, the tokenizer with its normalisation, and
    `settings.json`, {"max_length": 77, "bos": id, "eos": id, "pad": id}; bos is null for T5, which begins without.
    """

    def __init__(self, folder: Path) -> None:
        """BundleError when a file is missing or damaged."""
        settings = _read_settings(folder / "settings.json")
        self.max_length, self.eos, self.pad = (settings[key] or 0 for key in ("max_length", "eos", "pad"))
        self.bos = settings["bos"]
        path = folder / "tokenizer.json"
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # tokenizers raises no class of its own
            raise BundleError("the tokenizer cannot be read", where=path, got=error, hint=REBUILD) from error

    def encode(self, prompt: str) -> Encoded:
        """RequestError unless `prompt` is text; the empty prompt is text."""
        if not isinstance(prompt, str):
            got = f"{type(prompt).__name__} {prompt!r}"
            raise RequestError("the prompt is not text", expected="a string", got=got)
        try:
            ids: list[int] = self._tokenizer.encode(prompt, add_special_tokens=False).ids
        except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair is no character
            raise RequestError("the prompt is not valid Unicode", got=repr(prompt)) from error
        start = [] if self.bos is None else [self.bos]
        room = self.max_length - 1 - len(start)
        row = [*start, *ids[:room], self.eos]
        row += [self.pad] * (self.max_length - len(row))
        return Encoded(ids=np.array([row], np.int64), cut=self._decode(ids[room:]))

    def _decode(self, ids: list[int]) -> str:
        # The suffix of a word's last token is not part of the decoder: transformers replaces it just so.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace("</w>", " ").strip()


def _read_settings(path: Path) -> dict[str, int | None]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError("the tokenizer's settings cannot be read", where=path, got=error, hint=REBUILD) from error
    if not (
        isinstance(settings, dict)
        and set(settings) == set(SETTINGS)
        and all(type(v) is int and v >= 0 for k, v in settings.items() if k != "bos" or v is not None)
        and settings["max_length"] > 2
    ):
        raise BundleError(
            "the tokenizer's settings are wrong",
            where=path,
            expected=f"{', '.join(SETTINGS)}: integers, max_length above 2; bos may be null",
            got=json.dumps(settings)[:200],
            hint=REBUILD,
        )
    return settings
