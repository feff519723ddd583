"""How much memory the engines of a plan will take, from the facts beside the artifacts that the store already holds."""

from __future__ import annotations

from typing import Any

from toolchain.builder.plan import Plan
from toolchain.builder.steps import StepId
from toolchain.bundle.bundle import PROFILES
from toolchain.bundle.forecast import EngineMemory, engine_memory, number_facts
from toolchain.signature import GraphSpec
from toolchain.store.facts import ENGINE_FACTS, GRAPH_FACTS


def planned(plan: Plan) -> list[EngineMemory]:
    """The memory of every engine that is built or, where there is none yet, of its exported graph."""
    engines = []
    for step in plan.steps:
        if step.stage == "graph":
            component, bucket = step.id.component, step.id.label
            weights = plan.artifact(StepId("weights", component))
            size = sum(record.size for record in weights.files.values()) if weights else 0
            sources = [
                (StepId("engine", component, bucket), ENGINE_FACTS),
                (StepId("engine", component, PROFILES), ENGINE_FACTS),
            ]
            if plan.recipe.component(component).quantize is None:  # which an exported graph knows nothing of
                sources.append((step.id, GRAPH_FACTS))
            signature: Any = step.inputs["signature"]
            for source, file in sources:
                artifact = plan.artifact(source)
                facts = number_facts(artifact.path / file) if artifact else {}
                if facts:
                    spec = GraphSpec.from_json(signature)
                    folder = f"engines/{component}/{source.label}"
                    engines.append(engine_memory(component, bucket, spec, facts, size, folder))
                    break
    return engines
