"""The numbered cases of `watch`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from tests.graph.test_simplify import F32, model, ops, value, weight
from tests.precision.test_weight_only import product, three_convolutions
from tests.rtx import Parsed
from toolchain.errors import ExportError
from toolchain.graph.parser_rules import refusals
from toolchain.graph.placeholder import placeholder
from toolchain.graph.typed import check_types
from toolchain.precision.collect import WATCHED, Watched
from toolchain.precision.watch import SAMPLED, watch, watched

FLOATS = [F32, ir.DataType.FLOAT16, ir.DataType.BFLOAT16]


def attention(tokens: int = 6, width: int = 64) -> ir.Model:
    """Three products of one activation, and a fourth of their sum."""
    x = value("x", (2, tokens, width))
    weights = [weight(f"{name}.weight", (width, width)) for name in ("q", "k", "v", "out")]
    nodes = [
        ir.node("MatMul", [x, w], outputs=[value(f"{w.name}.y", (2, tokens, width))], name=str(w.name))
        for w in weights[:3]
    ]
    q, k, v = (node.outputs[0] for node in nodes)
    nodes.append(ir.node("Sum", [q, k, v], outputs=[value("sum", (2, tokens, width))]))
    nodes.append(ir.node("MatMul", [nodes[-1].outputs[0], weights[3]], outputs=[value("y", (2, tokens, width))]))
    return model(nodes, [x], [nodes[-1].outputs[0]], weights)


def run(graph: ir.Model, arrays: dict[str, np.ndarray], **inputs: np.ndarray) -> dict[str, np.ndarray]:
    """The outputs by ONNX Runtime."""
    import onnxruntime

    graph = graph.clone()
    for name, array in arrays.items():
        graph.graph.initializers[name].const_value = ir.tensor(array, name=name)
    session = onnxruntime.InferenceSession(ir.to_proto(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, inputs), strict=True))


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_1_peaks_of_a_convolution_are_of_axis_1_and_samples_of_everything() -> None:
    graph = three_convolutions()
    weights = {f"{name}.weight": random(32, 32, 3, 3) for name in ("first", "body.middle", "last")}
    x = random(1, 32, 8, 8)
    outputs = run(watch(graph), weights, x=x)
    assert [w.weights for w in watched(graph)] == [("first.weight",), ("body.middle.weight",), ("last.weight",)]
    assert {(w.channels, w.samples) for w in watched(graph)} == {(32, 32 * 8 * 8)}
    parts = outputs[WATCHED].reshape(3, -1)
    peaks, samples = parts[:, :32], parts[:, 32:]
    np.testing.assert_array_equal(peaks[0], np.abs(x).max(axis=(0, 2, 3)))
    np.testing.assert_array_equal(np.sort(samples[0]), np.sort(x.ravel()))
    first = np.maximum.reduce(np.abs(run(graph_until_first(), weights, x=x)["first.y"]), axis=(0, 2, 3))
    np.testing.assert_allclose(peaks[1], first, rtol=1e-5)


def graph_until_first() -> ir.Model:
    graph = three_convolutions()
    first, second, third = list(graph.graph)
    graph.graph.outputs[0] = first.outputs[0]
    graph.graph.remove([third, second])
    return graph


@pytest.mark.parametrize(
    ("op", "shape", "attributes"),
    [
        ("MatMul", (64, 128), {}),
        ("MatMul", (128, 64), {"flipped": True}),
        ("Gemm", (64, 128), {}),
        ("Gemm", (128, 64), {"transB": 1}),
    ],
)
def test_1_peaks_of_a_product_are_of_its_last_axis(op: str, shape: Any, attributes: dict[str, Any]) -> None:
    x = random(4, 64)
    graph = product(op, shape, **attributes)
    outputs = run(watch(graph), {"linear.weight": random(*shape)}, x=x)
    np.testing.assert_array_equal(outputs[WATCHED][:64], np.abs(x).max(axis=0))
    assert watched(graph) == (Watched(("linear.weight",), 64, 256),)


def test_1_a_transposed_input_has_its_channels_first() -> None:
    x, w = value("x", (64, 4)), weight("linear.weight", (64, 128))
    node = ir.node("Gemm", [x, w], {"transA": 1}, outputs=[value("y", (4, 128))])
    graph = model([node], [x], [node.outputs[0]], [w])
    given = random(64, 4)
    np.testing.assert_array_equal(
        run(watch(graph), {"linear.weight": random(64, 128)}, x=given)[WATCHED][:64], np.abs(given).max(axis=1)
    )


def test_1_a_transposed_convolution() -> None:
    graph = three_convolutions()
    list(graph.graph)[1].op_type = "ConvTranspose"
    assert [w.channels for w in watched(graph)] == [32, 32, 32]
    check_types(watch(graph))


def test_2_q_k_and_v_share_one_activation() -> None:
    graph = attention()
    assert watched(graph) == (Watched(("q.weight", "k.weight", "v.weight"), 64, 768), Watched(("out.weight",), 64, 768))
    assert ops(watch(graph)).count("ReduceMax") == ops(watch(graph)).count("Slice") == 2


@pytest.mark.parametrize("dtype", FLOATS)
def test_3_the_output_is_float32_and_every_parser_takes_it(dtype: ir.DataType) -> None:
    graph = watch(product("MatMul", (64, 128), dtype=dtype))
    own, added = graph.graph.outputs
    assert own.dtype == dtype
    assert (added.name, added.dtype, list(added.shape or ())) == (WATCHED, F32, [64 + 256])
    check_types(graph)
    assert refusals(graph) == []
    assert Parsed(graph).refused == []


def test_3_nvidias_parser_takes_convolutions_too() -> None:
    graph = watch(three_convolutions())
    assert refusals(graph) == []
    assert Parsed(graph).refused == []


@pytest.mark.parametrize("tokens", [64, 100, 333, 4096])
def test_4_a_sample_has_every_channel_and_token(tokens: int) -> None:
    """With a stride of 64, say, it would have one channel in 64 alone."""
    width = 64
    graph = attention(tokens, width)
    (first, _) = watched(graph)
    assert first.samples <= SAMPLED
    assert first.samples >= min(SAMPLED, 2 * tokens * width) * 0.5
    x = np.broadcast_to(np.arange(1, width + 1, dtype=np.float32), (2, tokens, width)).copy()
    arrays = {f"{name}.weight": random(width, width) for name in ("q", "k", "v", "out")}
    samples = run(watch(graph), arrays, x=x)[WATCHED][width : width + first.samples]
    share = np.bincount(samples.astype(int))[1:] / len(samples)
    assert (np.abs(share - 1 / width) < 0.15 / width).all()
    size = math.prod(x.shape)
    rows = np.arange(size, dtype=np.int64)[:: math.ceil(size / first.samples)] // width
    assert len(np.unique(rows)) > 0.9 * min(first.samples, 2 * tokens)


def test_5_without_weights_nothing_is_added() -> None:
    x = value("x", (64, 64))
    node = ir.node("MatMul", [x, x], outputs=[value("y", (64, 64))])
    graph = model([node], [x], [node.outputs[0]], [])
    assert watched(graph) == ()
    assert ir.to_proto(watch(graph)).SerializeToString() == ir.to_proto(graph).SerializeToString()


def test_5_what_does_not_change_with_the_prompt_is_not_watched() -> None:
    w, constant = weight("linear.weight", (64, 64)), weight("positions", (4, 64))
    node = ir.node("MatMul", [constant, w], outputs=[value("y", (4, 64))])
    assert watched(model([node], [], [node.outputs[0]], [w, constant])) == ()


def test_5_the_given_graph_stays() -> None:
    graph = attention()
    before = ir.to_proto(graph).SerializeToString()
    watch(graph)
    assert ir.to_proto(graph).SerializeToString() == before


def test_a_shape_that_is_not_static_is_an_error() -> None:
    x, w = value("x", ("batch", 64)), weight("linear.weight", (64, 128))  # type: ignore[arg-type]
    node = ir.node("MatMul", [x, w], outputs=[value("y", ("batch", 128))], name="linear")  # type: ignore[arg-type]
    graph = model([node], [x], [node.outputs[0]], [w])
    w.const_value = placeholder("linear.weight", F32, (64, 128))
    with pytest.raises(ExportError, match="static shape"):
        watch(graph)
