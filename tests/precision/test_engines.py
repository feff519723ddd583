"""Engines with weights in few bits: their numbers, their size, and the pictures of all four families."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import toolchain
from tests.families import MAKERS
from tests.graph.test_simplify import model, value
from tests.parity import Build, least_psnr_db
from tests.precision.test_rounding import write
from tests.precision.test_weight_only import product, three_convolutions
from tests.pretend import pretended
from tests.rtx import Parsed, real_trt
from toolchain import api
from toolchain.cli.inspect import bundle_json, bundle_lines
from toolchain.engines.buffers import HostMemory
from toolchain.engines.onnxruntime.build import OnnxRuntimeBuilder
from toolchain.engines.onnxruntime.run import OnnxRuntimeRunner
from toolchain.graph.placeholder import placeholder
from toolchain.precision.changes import NONE, Changes
from toolchain.precision.rounding import channel_scales, quantize, stored_scales, stored_values
from toolchain.precision.rounding import widened as widened_as
from toolchain.precision.stored import Form, Stored
from toolchain.precision.weight_only import quantize_weights
from toolchain.recipe.options import OnnxRuntimeOptions
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.store.facts import read_facts
from toolchain.weights.derived import find_tensors, weight_uses, write_weights
from toolchain.weights.mapped import read_header

F32 = np.dtype(np.float32)
F16 = ir.DataType.FLOAT16
BUILDER, RUNNER = OnnxRuntimeBuilder(), OnnxRuntimeRunner()


def run(
    folder: Path, graph: ir.Model, arrays: dict[str, Any], x: np.ndarray, level: Any, changes: Changes = NONE
) -> tuple[np.ndarray, int]:
    """The output of an engine over these weights, and the bytes of all its files."""
    write(folder, arrays, "F32")
    ir.save(graph, folder / "graph.onnx")
    uses = weight_uses(graph)
    tensors = find_tensors(uses, read_header(folder / "c.safetensors"), folder)
    files = {"weights": folder / "weights.safetensors"}
    write_weights(uses, tensors, files["weights"], changes=changes)
    options = OnnxRuntimeOptions(level, threads=1)
    pack = BUILDER.packer(options)
    if pack is not None:
        pack(folder / "graph.onnx", files, folder)
        files["packed"] = folder / "packed.safetensors"
    (folder / "engine").mkdir()
    BUILDER.build(folder / "graph.onnx", files, folder / "engine", options)
    output = graph.graph.outputs[0]
    assert output.shape is not None
    shape = tuple(int(d) for d in output.shape)
    spec = GraphSpec((TensorSpec("x", "float32", x.shape),), (TensorSpec(str(output.name), "float32", shape),))
    engine = RUNNER.open(folder / "engine", files, spec, options, HostMemory())
    y = np.zeros(shape, F32)
    engine.bind({"x": x, str(output.name): y})()
    engine.close()
    return y, sum(f.stat().st_size for f in (*files.values(), *(folder / "engine").iterdir()))


def widened(weight: np.ndarray) -> np.ndarray:
    scales = channel_scales(weight, 0, "max", F32)
    wide: np.ndarray = quantize(weight, scales, 0) * scales.reshape(-1, *[1] * (weight.ndim - 1))
    return wide


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_a_product_equals_the_widened_weight(level: str, tmp_path: Path) -> None:
    """To float32's accuracy: ONNX Runtime's own fusion would round activations to int8. And one copy of the weight."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((128, 64)).astype(F32)
    x = generator.standard_normal((4, 64)).astype(F32)
    graph = quantize_weights(BUILDER.prepare(product("MatMul", (128, 64), flipped=True)), ())
    y, size = run(tmp_path, graph, {"linear.weight": weight}, x, level)
    np.testing.assert_allclose(y, x @ widened(weight).T, rtol=1e-5, atol=1e-5)
    assert np.abs(y - x @ weight.T).max() > 1e-3  # it was quantised
    assert size < 1.6 * weight.size


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_a_convolution_equals_the_widened_weight(level: str, tmp_path: Path) -> None:
    import torch

    generator = np.random.default_rng(0)
    names = ("first.weight", "body.middle.weight", "last.weight")
    weights = {name: generator.standard_normal((32, 32, 3, 3)).astype(F32) / 17 for name in names}
    x = generator.standard_normal((1, 32, 8, 8)).astype(F32)
    y, _ = run(tmp_path, quantize_weights(BUILDER.prepare(three_convolutions()), ()), weights, x, level)
    expected = torch.from_numpy(x)
    for name, weight in weights.items():
        wide = widened(weight) if name == "body.middle.weight" else weight
        expected = torch.nn.functional.conv2d(expected, torch.from_numpy(wide), padding=1)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5)


def few_bits(weight: np.ndarray, stored: Stored) -> np.ndarray:
    """What an engine computes with."""
    scales = stored_scales(weight, stored, "max", F32)
    return widened_as(stored_values(weight, scales, stored), scales, stored)


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
@pytest.mark.parametrize("block", [32, 64, 128])
def test_a_product_with_int4_blocks(block: int, level: str, tmp_path: Path) -> None:
    """In float32 as well: activations are not rounded. The weight lies in the engine's files once."""
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((256, 128)).astype(F32)
    x = generator.standard_normal((4, 64 * 2)).astype(F32)
    graph = product("MatMul", (256, 128), flipped=True)
    graph.graph.inputs[0].shape = ir.Shape((4, 128))
    graph.graph.outputs[0].shape = ir.Shape((4, 256))
    quantized = quantize_weights(BUILDER.prepare(graph), (), Form("int4", block))
    y, size = run(tmp_path, BUILDER.finish(quantized), {"linear.weight": weight}, x, level)
    np.testing.assert_allclose(y, x @ few_bits(weight, Stored("int4", (256, 128), 1, block)).T, rtol=1e-4, atol=1e-4)
    assert np.abs(y - x @ weight.T).max() > 1e-1
    assert size < (0.5 + 4 / block) * weight.size + 4000
    facts = read_facts(tmp_path / "engine" / "engine.json")
    assert facts["packed_bytes"] == weight.size // 2  # which is let go where it is mapped
    assert facts["mapped_bytes"] == 4 * weight.size // block
    assert facts["activation_bytes"] is not None


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_a_product_with_float8(level: str, tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    weight = generator.standard_normal((128, 64)).astype(F32)
    x = generator.standard_normal((4, 64)).astype(F32)
    graph = quantize_weights(BUILDER.prepare(product("MatMul", (128, 64), flipped=True)), (), Form("float8"))
    y, size = run(tmp_path, BUILDER.finish(graph), {"linear.weight": weight}, x, level)
    np.testing.assert_allclose(y, x @ few_bits(weight, Stored("float8", (128, 64), 0)).T, rtol=1e-5, atol=1e-5)
    assert np.abs(y - x @ weight.T).max() > 1e-2
    assert size < 1.6 * weight.size


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_a_convolution_with_float8(level: str, tmp_path: Path) -> None:
    import torch

    generator = np.random.default_rng(0)
    names = ("first.weight", "body.middle.weight", "last.weight")
    weights = {name: generator.standard_normal((32, 32, 3, 3)).astype(F32) / 17 for name in names}
    x = generator.standard_normal((1, 32, 8, 8)).astype(F32)
    graph = quantize_weights(BUILDER.prepare(three_convolutions()), (), Form("float8"))
    y, _ = run(tmp_path, graph, weights, x, level)
    expected = torch.from_numpy(x)
    for name, weight in weights.items():
        wide = few_bits(weight, Stored("float8", weight.shape, 0)) if name == "body.middle.weight" else weight
        expected = torch.nn.functional.conv2d(expected, torch.from_numpy(wide), padding=1)
    np.testing.assert_allclose(y, expected.numpy(), rtol=1e-4, atol=1e-5)


PLAIN = """
buckets = ["1x64x64"]
[sampling]
steps = 2
step_counts = [2]
[check]
prompts = ["a"]
"""


PSNR_DB = {"int8": 45, "int4": 28, "float8": 32}
SHARES = {"int8": 0.75, "int4": 0.95, "float8": 0.75}
"""Convolutions, which have no blocks, make up most of a tiny UNet."""


@pytest.mark.parametrize("weights", PSNR_DB)
@pytest.mark.parametrize("family", MAKERS)
def test_a_family_draws_nearly_the_same_with_less(
    weights: str, family: str, build: Build, family_model: Callable[[str], Path]
) -> None:
    """Every component with weights in few bits, on a tiny model, whose random weights are harder than trained ones."""
    folder = family_model(family)
    plain = build(f"{family}-plain", folder, f'family = "{family}"\n{PLAIN}')
    tables = "".join(quantize_table(name, weights) for name in plain.bundle.engines)
    small = build(f"{family}-{weights}", folder, f'family = "{family}"\n{PLAIN}{tables}')
    pictures = [pipe(["a red circle"] * 2, seed=[0, 1]).images for pipe in (plain, small)]
    psnr = least_psnr_db(*pictures)  # type: ignore[arg-type]
    assert PSNR_DB[weights] <= psnr < 90  # equal would mean that nothing was quantised
    # Of models this small a third of the weights is left alone, as too small or as embeddings.
    assert size_of(small, "denoiser") < SHARES[weights] * size_of(plain, "denoiser")
    inspection = api.inspect_bundle(small.bundle.path)
    facts = bundle_json(inspection)["quantized"]
    assert facts.keys() == small.bundle.engines.keys()
    for component, fact in facts.items():
        assert fact["of"] == fact["weights"] + sum(map(len, fact["left"].values()))
        said = f"{component}: {fact['weights']} of {fact['of']} weights in {weights}"
        assert any(line.startswith(said) for line in bundle_lines(inspection))
    assert bundle_json(api.inspect_bundle(plain.bundle.path))["quantized"] == {}


def quantize_table(component: str, weights: str) -> str:
    lines = [f"[components.{component}.quantize]", f'weights = "{weights}"']
    if weights == "int4":
        lines.append("block_size = 32")
    if weights == "float8" and component.startswith("vae"):
        lines.append("insist = true")
    return "\n".join([*lines, ""])


def size_of(pipe: Any, component: str) -> int:
    (entry,) = pipe.bundle.engines[component].values()
    return sum(pipe.bundle.files[name].size for name in entry.weights.values())


@pytest.mark.parametrize("weights", PSNR_DB)
def test_tensorrt_draws_the_same_picture(weights: str, build: Build, tiny_model: Path, tmp_path: Path) -> None:
    """On the pretended GPU, whose parser keeps NVIDIA's rules."""
    text = f'family = "sd"\n{PLAIN}{quantize_table("denoiser", weights)}'
    expected = build("cpu", tiny_model, text)(["a red circle"], seed=0).images
    with pretended(DIFFBUILD_CACHE=str(tmp_path)) as trt:
        pipe = build("tensorrt", tiny_model, f'backend = "tensorrt"\n{text}')
        assert least_psnr_db(pipe(["a red circle"], seed=0).images, expected) >= 60
        pipe.close()
        assert trt.violations == []


def test_tensorrt_for_rtx_builds_a_bundle(tiny_model: Path, tmp_path: Path, graphs_into: Callable[..., None]) -> None:
    """NVIDIA's own builder, in a process of its own, over the weight file; two buckets share a plan. The stand-in of
    other tests must not find its engines, and so it has a store of its own."""
    real_trt()
    text = f'family = "sd"\nbackend = "tensorrt_rtx"\n{PLAIN}[tensorrt_rtx]\ntargets = ["8.9"]\n'
    text = text.replace('["1x64x64"]', '["1x64x64", "2x64x64"]')
    for dtype, weights in (("float16", "int8"), ("bfloat16", "int4"), ("bfloat16", "float8")):
        table = f'[components.denoiser]\ndtype = "{dtype}"\n{quantize_table("denoiser", weights)}'
        (tmp_path / "rtx.toml").write_text(text + table)
        graphs_into(tmp_path / "store", tmp_path / "rtx.toml", tiny_model)
        bundle = toolchain.build(tmp_path / "rtx.toml", str(tiny_model), tmp_path / "bundle", store=tmp_path / "store")
        entry = bundle.engine("denoiser", bundle.buckets[0])
        facts = read_facts(bundle.path / entry.folder / "engine.json")
        assert facts["precision"]["asked"].keys() == {dtype}
        assert facts["quantized"]["type"] == weights
        assert facts["quantized"]["weights"] > 10


def linears(dtype: ir.DataType) -> ir.Model:
    """y = relu(x @ a.T) @ b.T, as torch exports it."""
    nodes: list[ir.Node] = []
    weights = []
    x = last = value("x", (64, 1024), dtype)
    for name in "ab":
        weight = value(f"{name}.weight", (1024, 1024), dtype)
        weight.const_value = placeholder(str(weight.name), dtype, (1024, 1024))
        weights.append(weight)
        turned = ir.node("Transpose", [weight], {"perm": [1, 0]}, outputs=[value(f"{name}.t", (1024, 1024), dtype)])
        product = ir.node("MatMul", [last, turned.outputs[0]], outputs=[value(f"{name}.y", (64, 1024), dtype)])
        active = ir.node("Relu", product.outputs, outputs=[value(f"{name}.z", (64, 1024), dtype)])
        nodes += [turned, product, active]
        last = active.outputs[0]
    return model(nodes, [x], [last], weights)


@pytest.mark.parametrize("form", [Form("int8"), Form("int4", 64), Form("float8")], ids=lambda form: form.bits)
@pytest.mark.parametrize("dtype", [F16, ir.DataType.FLOAT])
def test_plans_of_tensorrt_for_rtx_hold_few_bits(dtype: ir.DataType, form: Form) -> None:
    real_trt()
    share = (4 if form.block else 8) / dtype.bitwidth
    plain, small = (Parsed(g).build("SM89") for g in (linears(dtype), quantize_weights(linears(dtype), (), form)))
    assert plain is not None
    assert small is not None
    assert len(small) < (share + 0.15) * len(plain)
