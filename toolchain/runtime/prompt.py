"""Prompt -> token ids, without transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer

from toolchain.errors import BundleError, RequestError

REBUILD = "build the bundle again"
NUMBERS = ("max_length", "bos", "eos", "pad")


@dataclass(frozen=True)
class Encoded:
    """`ids` [1, max_length] int64, padded; `cut` is the end of the prompt that did not fit, "" when all did.

    mask  [1, max_length] int64: 0 for padding, else 1
    """

    ids: npt.NDArray[np.int64]
    mask: npt.NDArray[np.int64]
    cut: str


class PromptTokenizer:
    """The tokenizer of a text encoder: ids equal transformers' CLIPTokenizer or T5Tokenizer, padded and cut to
    `max_length`.

    Loads what `models.tokenizers.write_tokenizer` wrote: `tokenizer.json`, the tokenizer with its normalisation, and
    `settings.json`, {"max_length": 77, "bos": id, "eos": id, "pad": id, "vectors": {token: text}}; bos is null for T5,
    which begins without. `vectors` has the tokens of textual inversions of several vectors, and what to read for each.
    """

    def __init__(self, folder: Path) -> None:
        """BundleError when a file is missing or damaged."""
        settings = _read_settings(folder / "settings.json")
        self.max_length, self.eos, self.pad = (settings[key] or 0 for key in ("max_length", "eos", "pad"))
        self.bos = settings["bos"]
        self._vectors: dict[str, str] = settings["vectors"]
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
            encoding = self._tokenizer.encode(prompt, add_special_tokens=False)
            whole = self._with_all_vectors(prompt, encoding.tokens)
            if whole != prompt:
                encoding = self._tokenizer.encode(whole, add_special_tokens=False)
        except (UnicodeEncodeError, TypeError) as error:  # half of a surrogate pair is no character
            raise RequestError("the prompt is not valid Unicode", got=repr(prompt)) from error
        ids: list[int] = encoding.ids
        start = [] if self.bos is None else [self.bos]
        room = self.max_length - 1 - len(start)
        row = [*start, *ids[:room], self.eos]
        padding = self.max_length - len(row)
        mask = [1] * len(row) + [0] * padding
        row += [self.pad] * padding
        return Encoded(np.array([row], np.int64), np.array([mask], np.int64), self._decode(ids[room:]))

    def _with_all_vectors(self, prompt: str, tokens: list[str]) -> str:
        """As diffusers: it goes by the tokens that were found and replaces text, inside of longer words too."""
        for token in dict.fromkeys(tokens):
            if token in self._vectors:
                prompt = prompt.replace(token, self._vectors[token])
        return prompt

    def _decode(self, ids: list[int]) -> str:
        # The suffix of a word's last token is not part of the decoder: transformers replaces it just so.
        text: str = self._tokenizer.decode(ids, skip_special_tokens=False)
        return text.replace("</w>", " ").strip()


def _read_settings(path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError("the tokenizer's settings cannot be read", where=path, got=error, hint=REBUILD) from error
    if not (
        isinstance(settings, dict)
        and set(settings) == {*NUMBERS, "vectors"}
        and all(type(v := settings[k]) is int and v >= 0 for k in NUMBERS if k != "bos" or settings[k] is not None)
        and settings["max_length"] > 2
        and isinstance(settings["vectors"], dict)
        and all(isinstance(text, str) for text in settings["vectors"].values())
    ):
        raise BundleError(
            "the tokenizer's settings are wrong",
            where=path,
            expected=f"{', '.join(NUMBERS)}: integers, max_length above 2, bos may be null; vectors: a table of texts",
            got=json.dumps(settings)[:200],
            hint=REBUILD,
        )
    return settings
