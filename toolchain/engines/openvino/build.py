"""Engines of OpenVINO: models compiled for this device and exported without their weights, which lie in files beside.

An exported model has its graph transformations behind it; kernels are made, and weights brought into their layouts,
when it is opened. It points into the weight file by offset, so that all buckets share that file and its pages. Each
opened bucket holds its own copy of the weights in the layout of its kernels, as it does in ONNX Runtime.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.engines.cpu import saturates_int8
from toolchain.engines.layers import (
    SHORT,
    Layer,
    asked_dtypes,
    compare_precision,
    count_layers,
    require_precision,
)
from toolchain.engines.openvino.compiled import BLOB, BLOB_DIGEST, WEIGHT_BYTES, WEIGHTS, explained, settings
from toolchain.engines.openvino.device import core, has_device, lacks, missing_device, openvino_device
from toolchain.engines.openvino.prepare import finish, prepare
from toolchain.errors import EngineError
from toolchain.recipe.options import OpenVinoOptions
from toolchain.store.facts import ENGINE_FACTS
from toolchain.store.files import file_digest, some
from toolchain.store.links import link_file

if TYPE_CHECKING:
    import onnx_ir as ir

    from toolchain.recipe import Quantize

EXECUTED = {"f32": "float32", "bf16": "bfloat16", "f16": "float16", "i8": "int8"}
"""Types of executed layers, by OpenVINO's names, in lower case."""
UNCOUNTED = frozenset({"Input", "Output", "Const"})
PRODUCTS = frozenset({"Convolution", "Deconvolution", "FullyConnected", "MatMul"})
"""Layers whose kernel's name ends in the type that it computes in, as in "brgemm_avx512_bf16". Their `runtimePrecision`
is that of their weights. Of other layers it is what they compute in, and bytes are truth values or pixels."""
ADDED = re.compile(r"(/DequantizationMultiply|/WithoutBiases)$")
"""What OpenVINO appends to the name of a node that it splits in two."""


class OpenVinoBuilder:
    """`Builder` of the backend `openvino`."""

    name = "openvino"
    dtypes: tuple[str, ...] = ("float32", "bfloat16", "float16")
    run_options: tuple[str, ...] = ("threads", "pin_threads", "tensor_parallel")

    def device(self) -> dict[str, Any]:
        """The CPU's instruction set and the version of OpenVINO. Raises EngineError without OpenVINO."""
        return openvino_device()

    def problems(self, options: OpenVinoOptions) -> list[str]:
        """A device that is not here."""
        try:
            missing = not has_device(options.device)
        except EngineError:  # without OpenVINO nothing is known of devices, and nothing is built
            return []
        if not missing:
            return []
        expected = f"{' or '.join(core().available_devices)}, or its driver installed"
        return [f"device: OpenVINO finds no {options.device} here (expected {expected})"]

    def refuses_dtype(self, dtype: str, options: OpenVinoOptions) -> str | None:
        """Of a type that the device computes by widening it, which is slower than float32."""
        try:
            return lacks(options.device, dtype)
        except EngineError:
            return None

    def refuses_quantized(self, quantize: Quantize, options: OpenVinoOptions) -> str | None:
        """float8, which it would widen; on other devices than the CPU nothing of it was tried."""
        if quantize.weights == "float8":
            return f"{self.name} has no products in float8 (expected int8 or int4)"
        if options.device != "CPU":
            return f"{self.name} runs quantised weights on the CPU alone (expected no quantisation, or device = CPU)"
        return None

    def warning(self, quantize: Quantize) -> str | None:
        """Of convolutions whose weights alone are quantised, and of a CPU whose integer kernels saturate."""
        if quantize.activations == "none":
            return "OpenVINO widens the weights of convolutions into each engine file; products keep them as they are"
        if saturates_int8():
            return "this CPU has no VNNI: its products in int8 saturate, which check shows, and are hardly faster"
        return None

    prepare = staticmethod(prepare)
    finish = staticmethod(finish)

    def merges(self, options: OpenVinoOptions) -> bool:
        """No: each bucket has a graph with static shapes."""
        return False

    def reads_weights(self, options: OpenVinoOptions) -> bool:
        """Yes: weight files are mapped when an engine is opened."""
        return True

    def packer(self, options: OpenVinoOptions) -> None:
        """None: OpenVINO brings weights into the layouts of its kernels when it opens an engine."""
        return

    def build(
        self,
        graph: Path,
        weights: Mapping[str, Path],
        out: Path,
        options: OpenVinoOptions,
        progress: Callable[[str, float | None], None] = lambda phase, share: None,
    ) -> None:
        """Writes `model.blob` and `engine.json`. Raises EngineError and WeightsError, EngineError also where layers
        compute in another type than the graph has."""
        import onnx_ir as ir

        from toolchain.engines.openvino.memory import memory_facts

        model = ir.load(graph)
        compiled = _compiled(model, weights["weights"], out, options, graph, progress)
        layers = executed_layers(compiled, model)
        asked = asked_dtypes(model)
        precision = compare_precision(asked, layers)
        require_precision(precision, graph, "OpenVINO")
        _require_float32(asked, layers, graph)
        integers = _integer_products(model, layers, graph)
        progress("export", None)
        _export(compiled, out / BLOB)
        facts = {
            BLOB_DIGEST: file_digest(out / BLOB),
            WEIGHT_BYTES: weights["weights"].stat().st_size,
            **memory_facts(compiled, weights["weights"].stat().st_size),
            "precision": precision.to_json() | {"named": precision.named} | integers,
            "layers": count_layers(layers, fused_attention(model, layers)),
        }
        (out / ENGINE_FACTS).write_text(json.dumps(facts, indent=1) + "\n")


def _compiled(
    model: ir.Model,
    weights: Path,
    out: Path,
    options: OpenVinoOptions,
    graph: Path,
    progress: Callable[[str, float | None], None],
) -> Any:
    """A graph, compiled with its weights. EngineError for one that OpenVINO does not take."""
    import onnx_ir as ir

    from toolchain.weights.external import attach_weights
    from toolchain.weights.mapped import read_header

    if not has_device(options.device):
        raise missing_device(options.device)
    with tempfile.TemporaryDirectory(dir=out) as scratch:
        # OpenVINO follows no path out of the graph's folder.
        link_file(weights.resolve(), Path(scratch) / WEIGHTS)
        attach_weights(model, read_header(weights), WEIGHTS, scratch)
        ir.save(model, Path(scratch) / graph.name)
        progress("compile", None)
        try:
            return core().compile_model(str(Path(scratch) / graph.name), options.device, settings(options))
        except RuntimeError as error:
            raise EngineError("OpenVINO cannot compile the graph", where=graph, got=explained(error)) from error


def _export(compiled: Any, path: Path) -> None:
    try:
        exported = compiled.export_model()
    except RuntimeError as error:
        raise EngineError("OpenVINO cannot export the engine", where=path, got=explained(error)) from error
    path.write_bytes(exported.getvalue() if hasattr(exported, "getvalue") else exported)


def _require_float32(asked: Mapping[str, str], layers: list[Layer], where: Path) -> None:
    """EngineError for nodes that the graph has in float32 and that are computed in less: OpenVINO rounds to bfloat16
    what it is not told to leave, and says nothing."""
    wide = {node for node, dtype in asked.items() if dtype == "float32"}
    rounded = sorted({node for layer in layers if layer.dtypes & SHORT for node in layer.nodes} & wide)
    if rounded:
        raise EngineError(
            "OpenVINO built the engine in another precision than the graph's float32",
            where=where,
            expected=f"{len(wide)} convolutions and products in float32",
            got=f"{len(rounded)} in less: {some(rounded)}",
            hint="do not use this version of OpenVINO for the recipe",
        )


def _integer_products(model: ir.Model, layers: list[Layer], where: Path) -> dict[str, Any]:
    """How many products of rounded activations and weights there are, and which are not computed in int8; empty where
    there are none. EngineError where more than half of them are not."""
    from toolchain.engines.openvino.integer import rounded_products

    nodes = {str(node.name) for node in rounded_products(model)}
    if not nodes:
        return {}
    wide = sorted(nodes - {node for layer in layers if "int8" in layer.dtypes for node in layer.nodes})
    if 2 * len(wide) > len(nodes):
        raise EngineError(
            "OpenVINO does not compute in int8 what was quantised",
            where=where,
            expected=f"{len(nodes)} convolutions and products in int8",
            got=f"{len(nodes) - len(wide)}; wider: {some(wide)}",
            hint='quantise weights alone (activations = "none"), or use another version of OpenVINO',
        )
    return {"integer": {"asked": len(nodes), "wide": wide}}


def executed_layers(compiled: Any, model: ir.Model) -> list[Layer]:
    """The layers of a compiled model, with the nodes of its graph that each stands for."""
    products = _products_by_sum(model)
    layers = []
    for operator in compiled.get_runtime_model().get_ordered_ops():
        about = {key: str(value.value) for key, value in operator.get_rt_info().items()}
        kind = about.get("layerType", "")
        if kind in UNCOUNTED:
            continue
        nodes = [ADDED.sub("", name) for name in about.get("originalLayersNames", "").split(",")]
        spelled = about.get("runtimePrecision", "")
        if kind in PRODUCTS:
            nodes += [products[name] for name in nodes if name in products]
            spelled = about.get("primitiveType", "").rpartition("_")[2].lower()
        dtype = EXECUTED.get(spelled)
        layers.append(Layer(operator.get_friendly_name(), kind, frozenset({dtype} if dtype else ()), tuple(nodes)))
    return layers


def _products_by_sum(model: ir.Model) -> dict[str, str]:
    """Add -> the MatMul that it alone reads: a layer that is both is called after the Add."""
    products = {}
    for node in model.graph:
        uses = node.outputs[0].uses() if node.op_type == "MatMul" else []
        if len(uses) == 1 and (reader := next(iter(uses)).node).op_type == "Add":
            products[str(reader.name)] = str(node.name)
    return products


def fused_attention(model: ir.Model, layers: list[Layer]) -> int:
    """How many attentions of a graph run in one layer: OpenVINO fuses a Softmax with both of its products or not at
    all, and the name of what comes of it says nothing."""
    softmax = sum(node.op_type == "Softmax" for node in model.graph)
    return softmax - sum(layer.kind == "Softmax" for layer in layers)
