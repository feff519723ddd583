"""Tokenizers for the bundle: read with transformers, written for the runtime, which has only `tokenizers`."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError


def write_tokenizer(folder: Path, cls: str, length: int, out: Path) -> None:
    """A model's tokenizer folder -> `tokenizer.json` and `settings.json` in `out`, for `runtime.prompt`.

    cls     CLIPTokenizer: `folder` holds vocab.json and merges.txt, or tokenizer.json. T5Tokenizer: spiece.model or
            tokenizer.json
    length  tokens that the text encoder takes

    ModelError when files are missing or cannot be read, or when the tokenizer does something that the runtime does not
    repeat.
    """
    t5 = cls.startswith("T5")
    require_vocabulary(folder, t5)
    tokenizer = _load(folder, "T5Tokenizer" if t5 else "CLIPTokenizer")
    for key in ("padding_side", "truncation_side"):
        if getattr(tokenizer, key) != "right":
            raise ModelError(
                f"the tokenizer has an unsupported {key}", where=folder, expected="right", got=getattr(tokenizer, key)
            )
    settings = {
        "max_length": length,
        "bos": None if t5 else tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for key, value in settings.items():
        if not isinstance(value, int) and not (t5 and key == "bos"):
            raise ModelError(f"the tokenizer has no {key} token", where=folder, expected="a token of its vocabulary")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(_plain(tokenizer), encoding="utf-8")
    (out / "settings.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")


def require_vocabulary(folder: Path, t5: bool = False) -> None:
    """ModelError without it: transformers makes a tokenizer of two words then, and says nothing."""
    wanted = {"spiece.model"} if t5 else {"vocab.json", "merges.txt"}
    held = {name for name in (*wanted, "tokenizer.json") if (folder / name).is_file()}
    if "tokenizer.json" not in held and held != wanted:
        raise ModelError(
            "the tokenizer is incomplete",
            where=folder,
            expected=f"{' and '.join(sorted(wanted, reverse=True))}, or tokenizer.json",
            got=", ".join(sorted(held)) or "none of them",
            hint="download the model again",
        )
    # transformers says that another package is missing, which it tries after this one.
    if "tokenizer.json" not in held and t5 and find_spec("sentencepiece") is None:
        raise ModelError(
            "the tokenizer is there as a SentencePiece model alone, and the package that reads it is not",
            where=folder / "spiece.model",
            expected="tokenizer.json beside it",
            hint="pip install sentencepiece; or where it is installed, write a tokenizer.json with transformers: "
            "T5Tokenizer.from_pretrained(FOLDER).save_pretrained(FOLDER)",
        )


def _load(folder: Path, cls: str) -> Any:
    import transformers

    try:
        return getattr(transformers, cls).from_pretrained(folder, local_files_only=True)
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
