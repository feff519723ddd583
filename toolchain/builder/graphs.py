"""The graphs of a plan as a folder of ONNX files without weights, for use elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from toolchain.builder.plan import Plan, execute
from toolchain.builder.stages.graph import GRAPH
from toolchain.builder.steps import Step
from toolchain.store.files import publish_folder
from toolchain.store.plain_json import encode


def write_graphs(plan: Plan, output: Path, progress: Callable[[Step, str], None]) -> list[Path]:
    """Builds the graphs of a plan of graphs only and writes them into `output`; returns their paths.

    Beside every `COMPONENT-BUCKET.onnx` lies a `.weights.json`: which checkpoint tensor each initializer is, and, where
    the checkpoint is there, in which file, at which offset and how long. Raises ExportError, WeightsError and
    StoreError.
    """
    import onnx_ir as ir

    from toolchain.weights.derived import find_tensors, weight_uses
    from toolchain.weights.safetensors import read_folder

    folders = {c.name: plan.source.path / c.folder for c in plan.family.components}
    # Read now, so that a damaged file is found before the graphs are built and not after.
    checkpoints = {name: read_folder(f) for name, f in folders.items() if plan.source.has_weights(f.name)}
    built = execute(plan, progress)
    names: list[str] = []

    def fill(folder: Path) -> None:
        for step in plan.steps:
            component = step.id.component
            graph = built[step.id].file(GRAPH)
            name = f"{component}-{step.id.label}"
            (folder / f"{name}.onnx").write_bytes(graph.read_bytes())
            uses = weight_uses(ir.load(graph))
            checkpoint = checkpoints.get(component)
            tensors = find_tensors(uses, checkpoint, folders[component]) if checkpoint is not None else {}
            locations = {k: {"file": str(t.file), "offset": t.offset, "nbytes": t.nbytes} for k, t in tensors.items()}
            entries = [{**asdict(use), **locations.get(use.name, {})} for use in uses]
            for entry in entries:
                del entry["stored"], entry["folded"]  # an exported graph has plain weights
            (folder / f"{name}.weights.json").write_text(encode(entries))
            names.append(f"{name}.onnx")

    publish_folder(output, fill, owns=lambda name: "/" not in name and name.endswith((".onnx", ".weights.json")))
    return [output / name for name in names]
