"""Tokenizers for the bundle: read with transformers, written for the runtime, which has only `tokenizers`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError

LONGEST = 100_000  # transformers says 1e30 where the model says nothing


def write_clip_tokenizer(folder: Path, out: Path) -> None:
    """A model's CLIPTokenizer folder -> `tokenizer.json` and `settings.json` in `out`, for `runtime.prompt`.

    `folder` holds vocab.json and merges.txt, or tokenizer.json. ModelError when it does not, when they cannot be read,
    or when the tokenizer does something that the runtime does not repeat.
    """
    require_vocabulary(folder)
    tokenizer = _load(folder)
    if not 2 < tokenizer.model_max_length < LONGEST:
        raise ModelError(
            "the tokenizer does not say how many tokens the text encoder takes",
            where=folder / "tokenizer_config.json",
            expected='"model_max_length": 77 or the like',
            got=tokenizer.model_max_length,
            hint="take it from max_position_embeddings of the text encoder's config.json",
        )
    for key in ("padding_side", "truncation_side"):
        if getattr(tokenizer, key) != "right":
            raise ModelError(
                f"the tokenizer has an unsupported {key}", where=folder, expected="right", got=getattr(tokenizer, key)
            )
    settings = {
        "max_length": int(tokenizer.model_max_length),
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for key, value in settings.items():
        if not isinstance(value, int):
            raise ModelError(f"the tokenizer has no {key} token", where=folder, expected="a token of its vocabulary")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(_plain(tokenizer), encoding="utf-8")
    (out / "settings.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def require_vocabulary(folder: Path) -> None:
    """ModelError without it: transformers makes a tokenizer of two words then, and says nothing."""
    held = {name for name in ("vocab.json", "merges.txt", "tokenizer.json") if (folder / name).is_file()}
    if "tokenizer.json" not in held and held != {"vocab.json", "merges.txt"}:
        raise ModelError(
            "the tokenizer is incomplete",
            where=folder,
            expected="vocab.json and merges.txt, or tokenizer.json",
            got=", ".join(sorted(held)) or "none of them",
            hint="download the model again",
        )


def _load(folder: Path) -> Any:
    from transformers import CLIPTokenizer

    try:
        return CLIPTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises no class of its own, and transformers lets parsers' errors through
        raise ModelError(
            "the tokenizer cannot be read",
            where=folder,
            got=f"{type(error).__name__}: {error}",
            hint="download the model again",
        ) from error


def _plain(tokenizer: Any) -> str:
    """tokenizer.json without truncation and padding, which the runtime does to know what was cut."""
    from tokenizers import Tokenizer

    plain = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    plain.no_truncation()
    plain.no_padding()
    return str(plain.to_str())
