"""How much memory the engines of a bundle will take, from the facts that their builders wrote. Imports nothing heavy.

A forecast for a process that has run every engine at least twice: what ONNX Runtime's arenas hold stays theirs. Mapped
weight files count for every engine, as they do in a process's resident memory, although buckets share their pages.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.signature import GraphSpec
from toolchain.store.facts import ENGINE_FACTS, read_facts

RUNTIME_BYTES = 14 << 20
"""ONNX Runtime's library, the imaging library and the rest: Linux on x86-64, after their imports."""
OPENVINO_BYTES = 30 << 20
"""More where OpenVINO runs the engines: its plugin for the CPU is loaded with the first of them."""
TOKENIZER_TIMES = 10
"""Resident bytes per byte of tokenizer.json: 36 MB for 49,408 words of CLIP, in 3.6 MB."""


@dataclass(frozen=True)
class EngineMemory:
    """Bytes that one engine takes.

    weights      in the mapped files, without what is packed; on a GPU, of the engine itself
    session      what an opened session keeps: packed copies of matrices, and the graph
    buffers      inputs and outputs
    activations  peak of the live tensors between the nodes; None where unknown
    arena        what stays allocated for activations after several runs; 0 where engines share a block
    built        False for an exported graph, whose weights and activations are those before a backend changes it
    source       what it is opened from: engines of one source share its weights
    """

    component: str
    bucket: str
    weights: int
    session: int
    buffers: int
    activations: int | None
    arena: int
    built: bool
    source: str

    @property
    def name(self) -> str:
        """The component, with its bucket where it has one."""
        return self.component if self.bucket == ANY else f"{self.component} {self.bucket}"

    @property
    def total(self) -> int:
        """Bytes of the engine alone."""
        return self.weights + self.session + self.buffers + self.arena

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump, the total included."""
        return {**vars(self), "total": self.total}


@dataclass(frozen=True)
class Forecast:
    """Memory of a bundle with every bucket in use.

    engines  the engines with facts beside them
    unknown  names of the engines without facts, or whose activations are unknown
    on_gpu   whether this is GPU memory, where engines share one block for their activations
    runtime  bytes on the host for everything but engines
    """

    engines: tuple[EngineMemory, ...]
    unknown: tuple[str, ...]
    on_gpu: bool
    runtime: int

    @property
    def total(self) -> int | None:
        """Bytes of the whole process, or of the GPU. None where an engine is unknown."""
        block = max((e.activations or 0 for e in self.engines), default=0) if self.on_gpu else 0
        weights = {e.source: e.weights for e in self.engines}
        engines = sum(e.total - e.weights for e in self.engines) + sum(weights.values())
        return None if self.unknown else self.runtime + block + engines

    def after(self, drawn: Collection[str]) -> int | None:
        """`total` after pictures were drawn with these engines alone, given by name.

        On the host the other engines have run once, to warm up: the block with room for all activations comes with the
        second run. On a GPU they are not open.
        """
        if self.on_gpu:
            return replace(self, engines=tuple(e for e in self.engines if e.name in drawn)).total
        saved = sum(e.activations or 0 for e in self.engines if e.name not in drawn)
        return None if self.total is None else self.total - saved

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump, the total included."""
        return {
            "of": "gpu" if self.on_gpu else "host",
            "engines": [engine.to_json() for engine in self.engines],
            "unknown": list(self.unknown),
            "runtime": self.runtime,
            "total": self.total,
        }


def forecast(bundle: Bundle) -> Forecast:
    """The forecast of a bundle, from its manifest and the fact files beside its engines."""
    engines, unknown = [], []
    for component, entries in bundle.engines.items():
        for bucket, entry in entries.items():
            facts = number_facts(bundle.path / entry.folder / ENGINE_FACTS)
            size = sum(bundle.files[name].size for name in entry.weights.values())
            memory = engine_memory(component, bucket, entry.spec, facts, size, entry.folder)
            if memory.activations is None:
                unknown.append(memory.name)
            if facts:
                engines.append(memory)
    on_gpu = bundle.device.get("kind") == "cuda"
    files = [bundle.files.get(f"{folder}/tokenizer.json") for folder in bundle.tokenizers.values()]
    words = TOKENIZER_TIMES * sum(file.size for file in files if file is not None)
    runtime = RUNTIME_BYTES + words + (OPENVINO_BYTES if bundle.backend == "openvino" else 0)
    return Forecast(tuple(engines), tuple(unknown), on_gpu, 0 if on_gpu else runtime)


def number_facts(path: Path) -> dict[str, int]:
    """The numbers among the facts in a file."""
    return {name: n for name, n in read_facts(path).items() if isinstance(n, int)}


def engine_memory(
    component: str, bucket: str, spec: GraphSpec, facts: Mapping[str, int], weight_bytes: int, source: str
) -> EngineMemory:
    """From what ONNX Runtime's backend wrote down, or TensorRT's, whose plan holds the weights, or a graph's export.

    weight_bytes  of the component's files, which a stripped plan is filled from
    """
    weights = facts.get("mapped_bytes", facts.get("plan_bytes", facts.get("weight_bytes", 0)))
    return EngineMemory(
        component,
        bucket,
        weights=weights + (weight_bytes if facts.get("stripped") else 0),
        session=facts.get("packed_bytes", 0) + facts.get("session_bytes", 0),
        buffers=sum(math.prod(t.shape) * np.dtype(t.dtype).itemsize for t in (*spec.inputs, *spec.outputs)),
        activations=facts.get("activation_bytes"),
        arena=facts.get("arena_bytes", 0),
        built="weight_bytes" not in facts,
        source=source,
    )
