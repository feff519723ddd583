"""Warnings that engines may not fit into GPU memory, before it runs out."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

log = logging.getLogger("toolchain")

MB = 1 << 20
FEWER_BUCKETS = "keep fewer buckets open (toolchain.load(..., open_buckets=1)), or end what else uses the GPU"


def load_warning(weights_bytes: int, activation_bytes: int, free_bytes: int) -> str | None:
    """A warning if the engines may not fit, else None.

    weights_bytes     of all plans that are open at once; of a stripped plan, its weight file's
    activation_bytes  of the engine that takes the most: they share one block
    """
    need = weights_bytes + activation_bytes
    if need <= free_bytes:
        return None
    return (
        f"the engines need {need // MB} MB of GPU memory; {free_bytes // MB} MB are free. "
        f"{FEWER_BUCKETS[0].upper()}{FEWER_BUCKETS[1:]}"
    )


def warn_of_load(weights_bytes: int, activation_bytes: int, free_bytes: int) -> None:
    """Logs `load_warning`, where there is one."""
    warning = load_warning(weights_bytes, activation_bytes, free_bytes)
    if warning is not None:
        log.warning("%s", warning)


def largest_open(weights: Mapping[Path, int], open_buckets: int | None) -> int:
    """The most bytes of weights on the GPU at once.

    weights       bytes of each engine, by its folder; the folders of a component's engines lie side by side
    open_buckets  how many engines of a component are open at once; None: all
    """
    by_component: dict[Path, list[int]] = {}
    for folder, size in weights.items():
        by_component.setdefault(folder.parent, []).append(size)
    return sum(sum(sorted(sizes, reverse=True)[:open_buckets]) for sizes in by_component.values())


def weight_bytes(component: Path) -> int:
    """Bytes of the weight files that a component's engines read: a bundle has them beside the engines' folders."""
    return sum(file.stat().st_size for file in component.glob("*.safetensors"))
