"""What can be quantised on its own, and what it costs a picture: from the graphs of a plan."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import onnx_ir as ir

from toolchain.builder.plan import Plan
from toolchain.builder.stages.graph import GRAPH
from toolchain.precision.cost import costs
from toolchain.precision.stored import Form
from toolchain.precision.weight_only import survey
from toolchain.recipe import Quantize

BLOCK = re.compile(r"(?:[^.]+\.)?mid_block\.[^.]+\.\d+(?=\.|$)|(?:[^\d.][^.]*\.)+?\d+(?:\.[^\d.][^.]*\.\d+)?(?=\.|$)")
"""The leading part of a module's name up to its first number, or the second where one name lies between them:
down_blocks.0.attentions.1, and transformer_blocks.3. There is one middle block, and so it has no number itself. No
block may lie in another one: an entry of `quantize.exclude` leaves all that is in it."""


@dataclass(frozen=True)
class Layers:
    """One layer, or all of a block: what an entry of `quantize.exclude` names.

    weights   by their names in the checkpoint
    macs      multiply-accumulates of one picture
    elements  of the weights
    """

    component: str
    pattern: str
    weights: tuple[str, ...]
    macs: int
    elements: int


@dataclass(frozen=True)
class Listing:
    """What the searched components could quantise.

    units  in the order of the graphs
    fixed  multiply-accumulates of a picture in all other constant weights
    """

    units: tuple[Layers, ...]
    fixed: int


def list_layers(plan: Plan, tables: Mapping[str, Quantize], evaluations: int, *, blocks: bool) -> Listing:
    """Of the components with `tables`; the graphs of `plan`, which quantises nothing, must be in the store.

    evaluations  of the denoiser for one picture
    """
    guided = 2 if plan.recipe.classifier_free_guidance else 1
    units: dict[tuple[str, str], list[tuple[str, int, int]]] = {}
    total = 0
    for component in plan.family.components:
        graph = next((s for s in plan.steps if s.stage == "graph" and s.id.component == component.name), None)
        if graph is None or component.name == "vae_encoder":  # no part of a picture from a text
            continue
        artifact = plan.artifact(graph.id)
        assert artifact is not None
        runs = evaluations if component.name == "denoiser" else guided if component.tokenizer else 1
        prepared = plan.backend.prepare(ir.load(artifact.file(GRAPH)))
        by_name = costs(prepared)
        total += runs * sum(cost.macs for cost in by_name.values())
        table = tables.get(component.name)
        if table is not None:
            for name in survey(prepared, table.exclude, Form(table.weights, table.block)).quantized:
                cost, module = by_name[name], name.rpartition(".")[0]
                unit = units.setdefault((component.name, block_of(module) if blocks else module), [])
                unit.append((name, runs * cost.macs, cost.elements))
    listed = tuple(_layers(units))
    return Listing(listed, total - sum(unit.macs for unit in listed))


def _layers(units: Mapping[tuple[str, str], list[tuple[str, int, int]]]) -> Iterator[Layers]:
    for (component, pattern), members in units.items():
        names, macs, elements = zip(*members, strict=True)
        yield Layers(component, pattern, names, sum(macs), sum(elements))


def block_of(module: str) -> str:
    """The block that a module lies in; the module itself where its name has no number."""
    match = BLOCK.match(module)
    return match[0] if match else module
