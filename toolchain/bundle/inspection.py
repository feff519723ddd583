"""What a bundle's engines consist of, as their builders wrote it down. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from toolchain.bundle.bundle import Bundle
from toolchain.bundle.forecast import Forecast, forecast
from toolchain.store.facts import ENGINE_FACTS, QUANTIZED, read_facts

SHOWN = ("activation_bytes", "precision", "layers")


@dataclass(frozen=True)
class Inspection:
    """A bundle and what there is to know about it here.

    refused   why it cannot run on this machine; None where it can
    verified  whether every file was compared with its sha256
    """

    bundle: Bundle
    refused: str | None
    verified: bool

    @cached_property
    def memory(self) -> Forecast:
        """What the engines will take."""
        return forecast(self.bundle)

    @cached_property
    def quantized(self) -> dict[str, dict[str, Any]]:
        """Of each component with quantised weights: their type, how many of how many, and why others are not."""
        listed = {}
        for component, entries in self.bundle.engines.items():
            for entry in entries.values():
                facts = read_facts(self.bundle.path / entry.folder / ENGINE_FACTS).get(QUANTIZED)
                if facts:
                    listed[component] = facts
        return listed

    @cached_property
    def engines(self) -> dict[str, dict[str, Any]]:
        """By "component bucket", what an engine's builder wrote down of its layers; only where it did."""
        listed: dict[str, dict[str, Any]] = {}
        for component, entries in self.bundle.engines.items():
            for entry in entries.values():
                facts = read_facts(self.bundle.path / entry.folder / ENGINE_FACTS)
                if "layers" in facts:
                    listed[f"{component} {Path(entry.folder).name}"] = {name: facts.get(name) for name in SHOWN}
        return listed
