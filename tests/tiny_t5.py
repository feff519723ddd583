"""A small T5 encoder and tokenizer in transformers' format, and what SentencePiece would write; no downloads."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from tests.tiny import WORDS

SPECIAL = (("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0))
SENTINELS = tuple((f"<extra_id_{i}>", 0.0) for i in range(99, -1, -1))


def t5_pieces() -> list[tuple[str, float]]:
    """(piece, log probability): special tokens, the words that `tests.tiny` knows, then single letters."""
    words = [(f"▁{word}", -2.0 - i / 8) for i, word in enumerate(WORDS)]
    parts = [("s", -3.0), ("ing", -4.0), ("▁s", -5.0), ("ir", -5.0), ("▁", -2.5)]
    letters = [(chr(c), -8.0 - c / 64) for c in range(ord("!"), ord("~") + 1) if chr(c) != "s"]
    return [*SPECIAL, *words, *parts, *letters, ("é", -9.0), ("ü", -9.0)]


def write_t5_tokenizer(folder: Path, **config: Any) -> Path:
    """tokenizer.json and tokenizer_config.json, as T5's on the hub are laid out; `config` adds to the latter."""
    vocabulary = [*t5_pieces(), *SENTINELS]
    special = dict([*SPECIAL, *SENTINELS])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    eos = {"SpecialToken": {"id": "</s>", "type_id": 0}}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": p, **flags} for i, (p, _) in enumerate(vocabulary) if p in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, metaspace]},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"Sequence": {"id": "A", "type_id": 0}}, eos],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, eos, {"Sequence": {"id": "B", "type_id": 0}}, eos],
            "special_tokens": {"</s>": {"id": "</s>", "ids": [1], "tokens": ["</s>"]}},
        },
        "decoder": metaspace,
        "model": {"type": "Unigram", "unk_id": 2, "vocab": vocabulary, "byte_fallback": False},
    }
    settings = {"tokenizer_class": "T5Tokenizer", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"extra_ids": 100} | config), encoding="utf-8")
    return folder


def t5_tokenizer(folder: Path, length: int) -> Any:
    from transformers import T5Tokenizer

    return T5Tokenizer.from_pretrained(write_t5_tokenizer(folder), model_max_length=length)


def t5_encoder(tokenizer: Any, *, width: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=width,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def write_spiece(path: Path) -> None:
    """The same vocabulary as SentencePiece's protocol buffer (sentencepiece_model.proto): what older folders hold."""
    kinds = {"<pad>": 3, "</s>": 3, "<unk>": 2}  # control, control, unknown
    pieces = b"".join(
        _field(
            1, _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + b"\x18" + bytes([kinds.get(piece, 1)])
        )
        for piece, score in t5_pieces()
    )
    trainer = _ints({3: 1, 40: 2, 41: -1, 42: 1, 43: 0})  # unigram; ids of unk, bos, eos, pad
    path.write_bytes(pieces + _field(2, trainer))


def _field(number: int, data: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(data)) + data


def _ints(fields: dict[int, int]) -> bytes:
    return b"".join(_varint(number << 3) + _varint(value % 2**64) for number, value in fields.items())


def _varint(value: int) -> bytes:
    low, rest = value & 127, value >> 7
    return bytes([low | 128]) + _varint(rest) if rest else bytes([low])
