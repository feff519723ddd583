"""Stage "tokenizer": a folder of tokenizer files -> one file that the runtime's tokenizer reads."""

from __future__ import annotations

from pathlib import Path


def write(source: Path, cls: str, length: int, folder: Path, *, t5: bool, inversion: bool) -> None:
    """`length` in tokens; `cls`, `t5` and `inversion` as in `models.tokenizers`. Raises ModelError."""
    from toolchain.models.tokenizers import write_tokenizer

    write_tokenizer(source, cls, length, folder, t5=t5, inversion=inversion)
