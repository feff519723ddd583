"""The small JSON files in which exports and builders write down facts about a graph or an engine.

They lie beside the graph or the engine, in the store and in bundles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ENGINE_FACTS = "engine.json"
"""In the folder of an engine: what its builder knows of memory, and of a TensorRT engine its precision and layers."""
QUANTIZED = "quantized"
"""In `ENGINE_FACTS` of an engine with quantised weights: `Survey.to_json`."""
GRAPH_FACTS = "memory.json"
"""In the folder of an exported graph: what its weights and activations take."""


def read_facts(path: Path) -> dict[str, Any]:
    """A file of facts; empty where it is missing or damaged: whether a bundle is intact is verified elsewhere."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return facts if isinstance(facts, dict) else {}
