"""What was built, engine by engine, as builders write it down: for `diffbuild inspect`. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from toolchain.bundle.bundle import Bundle
from toolchain.cli.output import megabytes
from toolchain.store.facts import ENGINE_FACTS, read_facts
from toolchain.terminal import table

TOLD = ("activation_bytes", "precision", "layers")


def engine_facts(bundle: Bundle) -> dict[str, dict[str, Any]]:
    """ "component bucket" -> what its builder told of its layers; nothing of engines whose backend tells none."""
    found: dict[str, dict[str, Any]] = {}
    for component, entries in bundle.engines.items():
        for entry in entries.values():
            facts = read_facts(bundle.path / entry.folder / ENGINE_FACTS)
            if "layers" in facts:
                found[f"{component} {Path(entry.folder).name}"] = {name: facts.get(name) for name in TOLD}
    return found


def engine_lines(bundle: Bundle) -> Iterator[str]:
    """A table of layers by kind and type, of whole attentions, and of activations."""
    engines = engine_facts(bundle)
    if not engines:
        return
    targets = bundle.recipe.to_json()[bundle.backend].get("targets")
    compiled = "" if targets is None else f", for compute capability {', '.join(targets) or '8.0 and newer'}"
    yield f"layers, by kind and by the smallest type that they touch{compiled}:"
    rows = []
    for name, facts in engines.items():
        kinds = facts["layers"]["kinds"]
        fused = f"{facts['layers']['fused_attention']} fused"
        rows.append([name, megabytes(facts["activation_bytes"]), fused, "; ".join(map(_kind, kinds.items()))])
    yield from table(rows, head=["", "activations", "attention", "layers"])


def _kind(entry: tuple[str, Mapping[str, int]]) -> str:
    kind, counts = entry
    return f"{kind} " + ", ".join(f"{count} {dtype}" for dtype, count in counts.items())
