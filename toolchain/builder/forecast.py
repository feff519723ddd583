"""How much memory the engines of a plan will take, from the facts beside the artifacts that the store already holds."""

from __future__ import annotations

from typing import Any

from toolchain.builder.plan import Plan
from toolchain.bundle.bundle import PROFILES
from toolchain.bundle.forecast import FACTS, GRAPH_FACTS, EngineMemory, engine_memory, read_facts
from toolchain.signature import GraphSpec
from toolchain.store.artifacts import Artifact


def planned(plan: Plan) -> list[EngineMemory]:
    """The memory of every engine that is built or, where there is none yet, of its exported graph."""
    engines = []
    for step in plan.steps:
        if step.stage == "graph":
            label = step.subject.removeprefix(f"{plan.recipe.name} ")
            component, bucket = label.split(" ")
            signature: Any = step.inputs["signature"]
            weights = _artifact(plan, f"weights {plan.recipe.name} {component}")
            size = sum(record.size for record in weights.files.values()) if weights else 0
            sources = (("engine", bucket, FACTS), ("engine", PROFILES, FACTS), ("graph", bucket, GRAPH_FACTS))
            for stage, folder, file in sources:
                artifact = _artifact(plan, f"{stage} {plan.recipe.name} {component} {folder}")
                facts = read_facts(artifact.path / file) if artifact else {}
                if facts:
                    spec = GraphSpec.from_json(signature)
                    engines.append(engine_memory(component, bucket, spec, facts, size, f"engines/{component}/{folder}"))
                    break
    return engines


def _artifact(plan: Plan, name: str) -> Artifact | None:
    """The artifact of a step; None where it is not built, or where the plan has no such step."""
    step = next((s for s in plan.steps if s.name == name), None)
    return plan.store.lookup(step.stage, step.key) if step else None
