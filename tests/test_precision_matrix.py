"""What is exported, in every precision, is typed as ONNX has it, and taken by those who must take it.

Each cell is one graph, as its backend prepares it: strict inference of types and shapes, the rules of TensorRT's oldest
parser, ONNX Runtime where it has the types, and NVIDIA's own parser and builder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.rtx import Parsed, real_trt
from tests.test_recipes import BUCKETS
from tests.test_recipes import MODELS as MAKERS
from toolchain.builder.plan import make_plan
from toolchain.builder.stages.graph import GRAPH
from toolchain.engines.builders import BUILDERS
from toolchain.engines.onnxruntime.integer_kernels import fuse_integer_products
from toolchain.engines.tensorrt.network import add_profiles
from toolchain.graph.parser_rules import refusals
from toolchain.graph.placeholder import is_weight
from toolchain.graph.profiles import merge_buckets, read_profiles
from toolchain.graph.typed import check_types
from toolchain.models.hub import resolve_model
from toolchain.models.registry import MODELS
from toolchain.precision.activations import quantize_activations
from toolchain.precision.stored import Form
from toolchain.precision.watch import watch
from toolchain.precision.weight_only import dequantized_weights, quantize_weights
from toolchain.recipe import Bucket, Check, ComponentRecipe, Recipe
from toolchain.store.artifacts import Store

DTYPES = ("float32", "float16", "bfloat16")
COMPONENTS = {family: [component.name for component in MODELS[family].components] for family in MAKERS}
CELLS = [
    *((family, name, dtype, True) for family, names in COMPONENTS.items() for name in names for dtype in DTYPES),
    *((family, "denoiser", dtype, False) for family in COMPONENTS for dtype in DTYPES),
]
NEWER = {"Conv", "InstanceNormalization"}
"""What the exporter writes in bfloat16 whatever the opset, and ONNX has in it only since 22."""
Graph = Callable[[str, str, str, bool, int], ir.Model]


def identity(value: Any) -> str:
    return {True: "guided", False: "plain"}[value] if isinstance(value, bool) else str(value)


def kept(family: str, name: str, dtype: str) -> tuple[str, ...]:
    """T5 in float16 is refused without it."""
    t5 = {"sd3": "text_encoder_3", "flux": "text_encoder_2"}.get(family)
    return ("encoder.block.*.layer.1.DenseReluDense.wo",) if (name, dtype) == (t5, "float16") else ()


@pytest.fixture(scope="module")
def graph(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Graph:
    """The export of a family's component in a type, guided or not, for the first or second bucket. From the store that
    all tests share: whoever needs it first exports it."""
    sources: dict[str, Any] = {}

    def of(family: str, name: str, dtype: str, guided: bool, number: int) -> ir.Model:
        if family not in sources:
            model = MAKERS[family](tmp_path_factory.mktemp(f"matrix-{family}"))
            if family == "sdxl":  # a VAE that was trained for float16: the other one is refused in it
                config = model / "vae" / "config.json"
                config.write_text(json.dumps(json.loads(config.read_text()) | {"force_upcast": False}))
            sources[family] = resolve_model(str(model))
        bucket = BUCKETS[family][number]
        recipe = Recipe(
            name=f"matrix-{family}-{dtype}",
            family=family,
            backend="tensorrt_rtx",
            buckets=(Bucket.parse(bucket),),
            classifier_free_guidance=guided,
            components={name: ComponentRecipe(dtype=dtype, keep_float32=kept(family, name, dtype))},  # type: ignore[arg-type]
            check=Check(prompts=("a",)),
        )
        plan = make_plan(recipe, sources[family], Store(store), graphs_only=True)
        (step,) = (s for s in plan.steps if s.id.component == name)
        artifact, _ = plan.store.get_or_build(
            step.stage, step.subject, step.inputs, lambda folder: step.run({}, folder, lambda phase, share: None)
        )
        return ir.load(artifact.file(GRAPH))

    return of


def require_session(model: ir.Model) -> None:
    """ONNX Runtime opens it, over weights of zeros."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    names, values = [], []
    for name, value in model.graph.initializers.items():
        if is_weight(value):
            tensor = value.const_value
            assert tensor is not None
            array = np.zeros(tuple(int(d) for d in tensor.shape), tensor.dtype.numpy())
            names.append(str(name))
            values.append(ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, int(tensor.dtype)))
    settings.add_external_initializers(names, values)
    data = ir.to_proto(model).SerializeToString()
    assert ort.InferenceSession(data, settings, providers=["CPUExecutionProvider"]).get_outputs()


@pytest.mark.parametrize(("family", "name", "dtype", "guided"), CELLS, ids=identity)
def test_a_graph(graph: Graph, family: str, name: str, dtype: str, guided: bool) -> None:
    exported = graph(family, name, dtype, guided, 0)
    prepared = BUILDERS["tensorrt_rtx"].prepare(exported)
    check_types(prepared)
    assert refusals(prepared) == []
    newer = NEWER & {node.op_type for node in exported.graph}
    assert {line.split()[0] for line in refusals(exported)} == (newer if dtype == "bfloat16" else set())
    if dtype != "bfloat16":
        require_session(BUILDERS["onnxruntime"].prepare(exported))
    real_trt()
    parsed = Parsed(prepared)
    assert parsed.refused == []
    assert parsed.build() is not None, parsed.errors()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MAKERS)
def test_the_denoisers_of_two_buckets_as_one_graph(graph: Graph, family: str, dtype: str) -> None:
    backend = BUILDERS["tensorrt_rtx"]
    merged = backend.prepare(merge_buckets([graph(family, "denoiser", dtype, True, number) for number in (0, 1)]))
    check_types(merged)
    assert len(read_profiles(merged)) == 2
    assert refusals(merged) == []
    real_trt()
    parsed = Parsed(merged)
    assert parsed.refused == []
    assert parsed.build(profiles=add_profiles) is not None, parsed.errors()


FORMS = [Form("int8"), Form("int4", 32), Form("float8")]
TARGETS = {"int8": (), "int4": (), "float8": ("SM89", "SM120")}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.bits)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MAKERS)
def test_a_denoiser_with_weights_in_few_bits(graph: Graph, family: str, dtype: str, form: Form) -> None:
    exported = graph(family, "denoiser", dtype, True, 0)
    rtx, cpu = (BUILDERS[name] for name in ("tensorrt_rtx", "onnxruntime"))
    quantized = rtx.finish(quantize_weights(rtx.prepare(exported), (), form))
    assert dequantized_weights(quantized)
    check_types(quantized)
    assert refusals(quantized) == []
    if dtype != "bfloat16":
        on_cpu = cpu.finish(quantize_weights(cpu.prepare(exported), (), form))
        check_types(on_cpu)
        assert not (form.block and dequantized_weights(on_cpu))
        require_session(on_cpu)
    real_trt()
    parsed = Parsed(quantized)
    assert parsed.refused == []
    assert parsed.build(*TARGETS[form.bits]) is not None, parsed.errors()


def in_eight_bits(backend: str, exported: ir.Model, form: Form = FORMS[0]) -> ir.Model:
    """Weights and smoothed activations, as a build makes it of a graph."""
    builder = BUILDERS[backend]
    quantized = quantize_weights(builder.prepare(exported), (), form)
    return builder.finish(quantize_activations(quantized, smooth=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MAKERS)
def test_a_denoiser_in_int8(graph: Graph, family: str, dtype: str) -> None:
    """One plan for all targets; on ONNX Runtime every quantised product of float32 has an integer kernel."""
    exported = graph(family, "denoiser", dtype, True, 0)
    quantized = in_eight_bits("tensorrt_rtx", exported)
    check_types(quantized)
    assert refusals(quantized) == []
    if dtype != "bfloat16":
        prepared = in_eight_bits("onnxruntime", exported)
        check_types(prepared)
        require_session(prepared)
        kernels = [node.op_type for node in fuse_integer_products(prepared).graph if node.domain]
        expected = len(dequantized_weights(prepared)) if dtype == "float32" else 0
        assert kernels == ["MatMulIntegerToFloat"] * expected
    real_trt()
    parsed = Parsed(quantized)
    assert parsed.refused == []
    assert parsed.build() is not None, parsed.errors()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", MAKERS)
def test_a_denoiser_in_float8(graph: Graph, family: str, dtype: str) -> None:
    exported = graph(family, "denoiser", dtype, True, 0)
    quantized = in_eight_bits("tensorrt_rtx", exported, FORMS[2])
    check_types(quantized)
    assert refusals(quantized) == []
    if dtype != "bfloat16":
        require_session(in_eight_bits("onnxruntime", exported, FORMS[2]))
    real_trt()
    parsed = Parsed(quantized)
    assert parsed.refused == []
    assert parsed.build(*TARGETS["float8"]) is not None, parsed.errors()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.bits)
def test_two_buckets_with_weights_in_few_bits_as_one_graph(graph: Graph, form: Form) -> None:
    merged = merge_buckets([graph("sd", "denoiser", "float16", True, number) for number in (0, 1)])
    quantized = quantize_weights(BUILDERS["tensorrt_rtx"].prepare(merged), (), form)
    check_types(quantized)
    assert refusals(quantized) == []
    real_trt()
    parsed = Parsed(quantized)
    assert parsed.refused == []
    assert parsed.build(*TARGETS[form.bits], profiles=add_profiles) is not None, parsed.errors()


def placeholders(model: ir.Model) -> dict[str, list[int]]:
    """The shapes of a graph's weights."""
    tensors = {str(name): value.const_value for name, value in model.graph.initializers.items() if is_weight(value)}
    return {name: [int(d) for d in tensor.shape] for name, tensor in tensors.items() if tensor is not None}


def test_two_buckets_in_int8_as_one_graph(graph: Graph) -> None:
    merged = in_eight_bits("tensorrt_rtx", merge_buckets([graph("sd", "denoiser", "float16", True, n) for n in (0, 1)]))
    first = in_eight_bits("tensorrt_rtx", graph("sd", "denoiser", "float16", True, 0))
    assert placeholders(merged) == placeholders(first)  # of which the weight file is made
    check_types(merged)
    assert refusals(merged) == []
    real_trt()
    parsed = Parsed(merged)
    assert parsed.refused == []
    assert parsed.build(profiles=add_profiles) is not None, parsed.errors()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["denoiser", "vae_decoder"])
@pytest.mark.parametrize("family", MAKERS)
def test_a_graph_that_is_watched(graph: Graph, family: str, name: str, dtype: str) -> None:
    """As a calibration has it built."""
    exported = graph(family, name, dtype, True, 0)
    prepared = watch(BUILDERS["tensorrt_rtx"].prepare(exported))
    check_types(prepared)
    assert refusals(prepared) == []
    if dtype != "bfloat16":
        require_session(watch(BUILDERS["onnxruntime"].prepare(exported)))
    real_trt()
    parsed = Parsed(prepared)
    assert parsed.refused == []
    if dtype == "float16":
        assert parsed.build("SM89") is not None, parsed.errors()


def test_float8_is_not_built_for_what_has_none(graph: Graph) -> None:
    exported = graph("sd", "denoiser", "float16", True, 0)
    real_trt()
    parsed = Parsed(quantize_weights(BUILDERS["tensorrt_rtx"].prepare(exported), (), Form("float8")))
    assert parsed.build("SM86") is None
    assert any("HW-specific datatypes" in error for error in parsed.errors()), parsed.errors()
