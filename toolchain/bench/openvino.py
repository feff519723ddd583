"""OpenVINO as a contender: the graphs of a bundle as they were exported, compiled for the CPU in float32.

The engines of a bundle hold another library's operators, so the plain graphs and their weights are taken from the
store, or exported into it. The runtime's own loop launches them: what differs is the engine, and nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.bundle.bundle import Bundle
from toolchain.engines.buffers import HostMemory
from toolchain.engines.cpu import physical_cores
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    import onnx_ir as ir


def plain_graphs(
    bundle: Bundle, model: Path, out: Path, progress: Callable[[str], None], store: str | Path | None = None
) -> Path:
    """Writes `COMPONENT-BUCKET.onnx` for every engine of the bundle, and the weights beside them, into `out`: returned.

    model  the diffusers folder that the bundle was built from
    store  where the graphs and weights are, or are built; None: the default store

    Raises ModelError, ExportError, WeightsError and StoreError.
    """
    from toolchain.builder.assemble import copy_file
    from toolchain.builder.plan import execute, make_plan
    from toolchain.builder.stages.graph import GRAPH
    from toolchain.builder.stages.weights import WEIGHTS, prepared
    from toolchain.builder.steps import StepId
    from toolchain.models.hub import resolve_model
    from toolchain.store.artifacts import Store, default_store

    plan = make_plan(bundle.recipe, resolve_model(str(model)), Store(Path(store or default_store())))
    wanted = replace(plan, steps=tuple(step for step in plan.steps if step.stage in ("graph", "weights")))
    built = execute(wanted, lambda step, what: progress(f"{step.stage} {step.subject}") if what == "start" else None)
    out.mkdir()
    for component, engines in bundle.engines.items():
        weights = out / f"{component}.safetensors"
        source = built[StepId("weights", component)].file(WEIGHTS)
        copy_file(source, weights)  # OpenVINO follows no link out of the graph's folder
        for label in engines:
            graph = built[StepId("graph", component, label)].file(GRAPH)
            quantize = bundle.recipe.component(component).quantize
            _attach(prepared(plan.backend, graph, quantize), weights, graph_of(out, component, label))
    return out


def graph_of(folder: Path, component: str, label: str) -> Path:
    """Where the graph of an engine lies."""
    return folder / f"{component}-{label}.onnx"


def _attach(model: ir.Model, weights: Path, target: Path) -> None:
    """A graph with its weights as external data: ONNX's own way, which knows offsets into any file."""
    import onnx_ir as ir

    from toolchain.weights.external import attach_weights
    from toolchain.weights.mapped import read_header

    attach_weights(model, read_header(weights), weights.name, weights.parent)
    ir.save(model, target)


class OpenVino:
    """A runner in place of the bundle's own backend; `graphs` is what `plain_graphs` wrote."""

    def __init__(self, bundle: Bundle, graphs: Path) -> None:
        import openvino

        self.name = bundle.backend
        self._core = openvino.Core()
        self._graphs = {
            (bundle.path / entry.folder, entry.spec): graph_of(graphs, component, label)
            for component, engines in bundle.engines.items()
            for label, entry in engines.items()
        }

    def available(self) -> str | None:
        """Always None: OpenVINO was imported by the constructor."""
        return None

    def refuse(self, *_: object) -> str | None:
        """Always None: the graphs run on every CPU."""
        return None

    def install(self, *_: object) -> str | None:
        """None: it is installed."""
        return None

    def memory(self, folders: Sequence[Path], options: Any, open_buckets: int | None = None) -> HostMemory:
        """Host memory."""
        return HostMemory()

    def open(
        self, folder: Path, weights: Mapping[str, Path], spec: GraphSpec, options: Any, memory: HostMemory
    ) -> OpenVinoEngine:
        """Compiles the graph of the engine that would be opened. Raises EngineError."""
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "INFERENCE_PRECISION_HINT": "f32",
            "INFERENCE_NUM_THREADS": str(getattr(options, "threads", 0) or physical_cores()),
        }
        graph = self._graphs[folder, spec]
        try:
            return OpenVinoEngine(self._core.compile_model(str(graph), "CPU", settings), spec)
        except RuntimeError as error:
            got = str(error).strip().splitlines()[-1]
            raise EngineError("OpenVINO cannot compile the graph", where=graph, got=got) from error


class OpenVinoEngine:
    """A compiled model, launched through requests on host memory."""

    def __init__(self, compiled: Any, spec: GraphSpec) -> None:
        self.spec = spec
        self._compiled = compiled

    def bind(self, buffers: Mapping[str, Any]) -> Callable[[], None]:
        """As `Engine.bind`."""
        import openvino

        request = self._compiled.create_infer_request()
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            if tensor.name in buffers:
                request.set_tensor(tensor.name, openvino.Tensor(buffers[tensor.name], shared_memory=True))

        def launch() -> None:
            request.start_async()  # not `infer`, which takes inputs and collects outputs into a dictionary
            request.wait()

        return launch

    def close(self) -> None:
        """Frees the model."""
        self._compiled = None
