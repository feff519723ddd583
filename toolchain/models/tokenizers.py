"""Tokenizers of a bundle: read with transformers, written for the runtime, which has `tokenizers` alone."""

from __future__ import annotations

import itertools
import json
from collections.abc import Collection, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from toolchain.errors import ModelError

# Of transformers 5: whatever tokenizer.json says. It stands where a tokenizer was loaded without a class of its own.
GENERIC = "TokenizersBackend"
SIDES = ("padding_side", "truncation_side")
PROBES = ("", "a lighthouse, at dusk!")


def write_tokenizer(folder: Path, cls: str, length: int, out: Path, *, t5: bool, inversion: bool) -> None:
    """A model's tokenizer folder -> `tokenizer.json` and `settings.json` in `out`, for `runtime.prompt`.

    cls        the class that model_index.json names
    length     tokens that the text encoder takes
    t5         whether the text encoder is a T5: `folder` holds spiece.model or tokenizer.json then; of a CLIP,
               vocab.json and merges.txt, or tokenizer.json
    inversion  whether the family's pipeline writes the other vectors of a textual inversion behind its first token

    ModelError when files are missing or cannot be read, or when the tokenizer does something that the runtime does not
    repeat.
    """
    require_vocabulary(folder, t5=t5, generic=cls == GENERIC)
    tokenizer = _load(folder, GENERIC if cls == GENERIC else "T5Tokenizer" if t5 else "CLIPTokenizer")
    require_right(folder, {side: getattr(tokenizer, side) for side in SIDES})
    settings = {
        "max_length": length,
        "bos": None if t5 else tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "pad": tokenizer.pad_token_id,
    }
    for key, value in settings.items():
        if not isinstance(value, int) and not (t5 and key == "bos"):
            raise ModelError(f"the tokenizer has no {key} token", where=folder, expected="a token of its vocabulary")
    if cls == GENERIC:
        _require_repeatable(folder, tokenizer, settings)
    vectors = _vectors(tokenizer.added_tokens_encoder) if inversion else {}
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(_plain(tokenizer), encoding="utf-8")
    (out / "settings.json").write_text(json.dumps(settings | {"vectors": vectors}) + "\n", encoding="utf-8")


def require_right(folder: Path, settings: Mapping[str, Any]) -> None:
    """ModelError for a tokenizer that pads or cuts on the left; what `settings` are silent about is on the right."""
    for side in SIDES:
        got = settings.get(side, "right")
        if got != "right":
            raise ModelError(f"the tokenizer has an unsupported {side}", where=folder, expected="right", got=got)


def _vectors(added: Collection[str]) -> dict[str, str]:
    """Added token -> the text that diffusers puts in its place, `TextualInversionLoaderMixin.maybe_convert_prompt`."""
    expansions = {}
    for token in added:
        numbered = (f"{token}_{i}" for i in itertools.count(1))
        others = list(itertools.takewhile(added.__contains__, numbered))
        if others:
            expansions[token] = " ".join([token, *others])
    return expansions


def _require_repeatable(folder: Path, tokenizer: Any, settings: dict[str, Any]) -> None:
    """ModelError unless prompts begin, end and are padded as in the runtime: tokenizer.json alone decides that here."""
    length = settings["max_length"]
    for probe in PROBES:
        got = tokenizer(probe, padding="max_length", max_length=length, truncation=True).input_ids
        ids = tokenizer(probe, add_special_tokens=False).input_ids
        start = [] if settings["bos"] is None else [settings["bos"]]
        row = [*start, *ids[: length - 1 - len(start)], settings["eos"]]
        expected = row + [settings["pad"]] * (length - len(row))
        if got != expected:
            raise ModelError(
                "the tokenizer does not begin, end or pad prompts as the text encoder's own class does",
                where=folder / "tokenizer.json",
                expected=f"{expected[:8]} for {probe!r}",
                got=got[:8],
            )


def require_vocabulary(folder: Path, *, t5: bool, generic: bool) -> None:
    """ModelError for a missing vocabulary, without which transformers silently makes a tokenizer of two words."""
    needed = set() if generic else {"spiece.model"} if t5 else {"vocab.json", "merges.txt"}
    held = {name for name in (*needed, "tokenizer.json") if (folder / name).is_file()}
    if "tokenizer.json" not in held and (generic or held != needed):
        raise ModelError(
            "the tokenizer is incomplete",
            where=folder,
            expected=", or ".join(filter(None, [" and ".join(sorted(needed, reverse=True)), "tokenizer.json"])),
            got=", ".join(sorted(held)) or "none of them",
            hint="download the model again",
        )
    # transformers says that another package is missing, which it tries after this one.
    if "tokenizer.json" not in held and t5 and find_spec("sentencepiece") is None:
        raise ModelError(
            "the tokenizer is only there as a SentencePiece model, and sentencepiece is not installed",
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
    data = json.loads(plain.to_str())
    if tokenizer.split_special_tokens:  # prompts hold none: what looks like one is text
        data["added_tokens"] = [token for token in data["added_tokens"] if not token["special"]]
    return json.dumps(data, ensure_ascii=False)
