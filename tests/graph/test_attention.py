"""The numbered cases of `fuse_attention`."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.graph.test_simplify import F32, model, ops, value
from toolchain.graph.attention import fuse_attention

B, H, S, L, D = 2, 3, 5, 7, 4


class Attention:
    """Builds softmax(q k^T) v over heads; `rows` are [B, S, H*D] inputs, `heads` [B, H, S, D] ones."""

    def __init__(self) -> None:
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []

    def add(self, op: str, inputs: list[ir.Value], shape: tuple[int, ...], **attributes: Any) -> ir.Value:
        self.nodes.append(ir.node(op, inputs, attributes, outputs=[value(f"v{len(self.nodes)}", shape)]))
        return self.nodes[-1].outputs[0]

    def constant(self, array: Any) -> ir.Value:
        tensor = ir.tensor(np.asarray(array))
        made = ir.Value(name=f"c{len(self.constants)}", const_value=tensor, shape=tensor.shape)
        made.type = ir.TensorType(tensor.dtype)
        self.constants.append(made)
        return made

    def split(self, x: ir.Value, rows: int) -> ir.Value:
        shaped = self.add("Reshape", [x, self.constant(np.array([B, rows, H, D]))], (B, rows, H, D))
        return self.add("Transpose", [shaped], (B, H, rows, D), perm=[0, 2, 1, 3])

    def scaled(self, x: ir.Value, scale: float) -> ir.Value:
        return self.add("Mul", [x, self.constant(np.float32([scale]))], tuple(x.shape or ()))

    def turned(self, key: ir.Value, flat: bool) -> ir.Value:
        if not flat:
            return self.add("Transpose", [key], (B, H, D, L), perm=[0, 1, 3, 2])
        rows = self.add("Reshape", [key, self.constant(np.array([B * H, L, D]))], (B * H, L, D))
        turned = self.add("Transpose", [rows], (B * H, D, L), perm=[0, 2, 1])
        return self.add("Reshape", [turned, self.constant(np.array([B, H, D, L]))], (B, H, D, L))

    def scores(self, query: ir.Value, key: ir.Value) -> ir.Value:
        return self.add("MatMul", [query, key], (B, H, S, L))

    def weighted(self, scores: ir.Value, values: ir.Value) -> ir.Value:
        share = self.add("Softmax", [scores], (B, H, S, L), axis=-1)
        return self.add("MatMul", [share, values], (B, H, S, D))

    def join(self, output: ir.Value) -> ir.Value:
        rows = self.add("Transpose", [output], (B, S, H, D), perm=[0, 2, 1, 3])
        return self.add("Reshape", [rows, self.constant(np.array([B, S, H * D]))], (B, S, H * D))

    def model(self, inputs: list[ir.Value], outputs: list[ir.Value]) -> ir.Model:
        return model(self.nodes, inputs, outputs, self.constants)


def rows() -> list[ir.Value]:
    return [value("q", (B, S, H * D)), value("k", (B, L, H * D)), value("v", (B, L, H * D))]


def run(graph: ir.Model) -> list[np.ndarray]:
    """Outputs on random inputs, by ONNX Runtime without optimisations."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(graph)
    proto.ir_version = 10
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(0)
    feeds = {i.name: rng.standard_normal(i.shape).astype(np.float32) for i in session.get_inputs()}
    return list(session.run(None, feeds))


def same(before: ir.Model, after: ir.Model) -> None:
    for one, other in zip(run(before), run(after), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("flat", [False, True])
def test_1_and_2_and_3_attention_is_one_node(flat: bool) -> None:
    made, (q, k, v) = Attention(), rows()
    key = made.scaled(made.turned(made.split(k, L), flat), 0.7)
    output = made.weighted(made.scores(made.scaled(made.split(q, S), 0.6), key), made.split(v, L))
    before = made.model([q, k, v], [made.join(output)])
    after = fuse_attention(before)
    assert ops(after) == ["MultiHeadAttention"]
    (node,) = after.graph
    assert node.attributes["num_heads"].as_int() == H
    assert node.attributes["scale"].as_float() == pytest.approx(0.42)
    same(before, after)


def test_2_heads_that_come_otherwise_are_brought_into_form() -> None:
    made = Attention()
    q, k, v = value("q", (B, H, S, D)), value("k", (B, H, L, D)), value("v", (B, H, L, D))
    output = made.weighted(made.scores(q, made.turned(k, False)), v)
    before = made.model([q, k, v], [made.join(output)])
    after = fuse_attention(before)
    assert [op for op in ops(after) if op not in ("Transpose", "Reshape", "Constant")] == ["MultiHeadAttention"]
    same(before, after)


def test_3_heads_that_are_read_otherwise_are_split_off() -> None:
    made, (q, k, v) = Attention(), rows()
    output = made.weighted(made.scores(made.split(q, S), made.turned(made.split(k, L), False)), made.split(v, L))
    before = made.model([q, k, v], [made.add("Neg", [output], (B, H, S, D)), made.join(output)])
    after = fuse_attention(before)
    assert "MultiHeadAttention" in ops(after)
    assert "Softmax" not in ops(after)
    same(before, after)


def test_4_a_mask_is_left_alone() -> None:
    made, (q, k, v) = Attention(), rows()
    scores = made.scores(made.split(q, S), made.turned(made.split(k, L), False))
    masked = made.add("Add", [scores, made.constant(np.zeros((1, 1, S, L), np.float32))], (B, H, S, L))
    before = made.model([q, k, v], [made.join(made.weighted(masked, made.split(v, L)))])
    assert ops(fuse_attention(before)) == ops(before)


def test_4_scores_that_are_read_elsewhere_are_left_alone() -> None:
    made, (q, k, v) = Attention(), rows()
    scores = made.scores(made.split(q, S), made.turned(made.split(k, L), False))
    outputs = [made.join(made.weighted(scores, made.split(v, L))), made.add("Neg", [scores], (B, H, S, L))]
    before = made.model([q, k, v], outputs)
    assert ops(fuse_attention(before)) == ops(before)


def test_the_given_model_is_not_changed() -> None:
    made, (q, k, v) = Attention(), rows()
    output = made.weighted(made.scores(made.split(q, S), made.turned(made.split(k, L), False)), made.split(v, L))
    before = made.model([q, k, v], [made.join(output)])
    names = ops(before)
    fuse_attention(before)
    assert ops(before) == names
    assert before.graph.outputs[0].dtype == F32
