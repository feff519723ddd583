"""MatMul, Softmax, MatMul over heads -> ONNX Runtime's MultiHeadAttention, which never writes down the scores.

1. softmax(q k^T) v without a mask becomes one node; scales that were multiplied into q and k become its attribute.
2. Heads that were split off [B, S, H*D] by a Reshape and a Transpose are taken from before them; heads that come
   otherwise, rotated say, are brought into that form.
3. What merges the heads again is left out; where the heads are read otherwise, they are split off the result.
4. Attention with a mask or a bias, or whose scores are read elsewhere, is left alone.
"""

from __future__ import annotations

import onnx_ir as ir
from onnx_ir.passes import common

from toolchain.graph.insert import Inserter, shape_of
from toolchain.graph.placeholder import is_weight

DOMAIN = "com.microsoft"
HEADS = (0, 2, 1, 3)
"""[B, S, H, D] <-> [B, H, S, D]"""


def fuse_attention(model: ir.Model) -> ir.Model:
    """A copy with ONNX Runtime's operator; the weights are shared with the given model."""
    model = model.clone()
    for node in list(model.graph):
        if node.op_type == "Softmax":
            _fuse(model.graph, node)
    if any(node.domain == DOMAIN for node in model.graph):
        model.opset_imports[DOMAIN] = 1
    common.RemoveUnusedNodesPass()(model)
    return model


def _fuse(graph: ir.Graph, softmax: ir.Node) -> None:
    scores, merged = _producer(softmax.inputs[0], "MatMul"), _reader(softmax.outputs[0], "MatMul")
    if scores is None or merged is None or merged.inputs[0] is not softmax.outputs[0] or _axis(softmax) not in (-1, 3):
        return
    if _reader(scores.outputs[0], "Softmax") is None:
        return
    query, query_scale = _unscaled(scores.inputs[0])
    turned, key_scale = _unscaled(scores.inputs[1])
    key, value, output = _untransposed(turned), merged.inputs[1], merged.outputs[0]
    if key is None or query is None or value is None:
        return
    shapes = [shape_of(v) for v in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes) or len({shape[:2] for shape in shapes}) != 1:
        return
    before = Inserter(merged)
    heads = shapes[0][1]
    batch, _, rows, width = shape_of(output)
    whole = before.add(
        "MultiHeadAttention",
        [_packed(before, v) for v in (query, key, value)],
        (batch, rows, heads * width),
        {"num_heads": heads, "scale": query_scale * key_scale},
        domain=DOMAIN,
    )
    joined = _joins_heads(output)
    if joined is None:
        split = before.reshape(whole, (batch, rows, heads, width))
        replaced, by = output, before.add("Transpose", [split], (batch, heads, rows, width), {"perm": HEADS})
    else:
        replaced, by = joined, whole
    ir.convenience.replace_all_uses_with(replaced, by, replace_graph_outputs=True)


def _packed(before: Inserter, heads: ir.Value) -> ir.Value:
    """[B, H, S, D] -> [B, S, H*D]"""
    batch, count, rows, width = shape_of(heads)
    whole = (batch, rows, count * width)
    split = _transposed(heads, HEADS)
    if split is None:
        split = before.add("Transpose", [heads], (batch, rows, count, width), {"perm": HEADS})
    source = _producer(split, "Reshape")
    if source is not None and source.inputs[0] is not None and shape_of(source.inputs[0]) == whole:
        return source.inputs[0]
    return before.reshape(split, whole)


def _producer(value: ir.Value | None, op: str) -> ir.Node | None:
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op and not node.domain else None


def _reader(value: ir.Value, op: str) -> ir.Node | None:
    """The only node that reads a value, where it is an `op` and the value is not the graph's output."""
    uses = list(value.uses())
    if len(uses) != 1 or value.is_graph_output():
        return None
    return uses[0].node if uses[0].node.op_type == op and not uses[0].node.domain else None


def _axis(softmax: ir.Node) -> int:
    axis = softmax.attributes.get("axis")
    return -1 if axis is None else axis.as_int()


def _unscaled(value: ir.Value | None) -> tuple[ir.Value | None, float]:
    """What a scalar was multiplied to, and the scalar."""
    node = _producer(value, "Mul")
    for one, other in ((0, 1), (1, 0)) if node is not None else ():
        assert node is not None
        constant = node.inputs[other]
        if constant is None or constant.const_value is None or is_weight(constant):
            continue
        if constant.const_value.size == 1:
            return node.inputs[one], float(constant.const_value.numpy().reshape(()))
    return value, 1.0


def _transposed(value: ir.Value | None, perm: tuple[int, ...]) -> ir.Value | None:
    node = _producer(value, "Transpose")
    attribute = node.attributes.get("perm") if node is not None else None
    return node.inputs[0] if node is not None and attribute is not None and tuple(attribute.as_ints()) == perm else None


def _untransposed(value: ir.Value | None) -> ir.Value | None:
    """[B, H, D, S] -> the [B, H, S, D] that it was made of, by one Transpose, or by one of [B*H, S, D]."""
    whole = _transposed(value, (0, 1, 3, 2))
    if whole is not None or value is None:
        return whole
    outer = _producer(value, "Reshape")
    flat = _transposed(outer.inputs[0], (0, 2, 1)) if outer is not None else None
    inner = _producer(flat, "Reshape")
    source = inner.inputs[0] if inner is not None else None
    if source is None or flat is None:
        return None
    *lead, width, rows = shape_of(value) or (0, 0)
    batch = 1
    for side in lead:
        batch *= side
    fits = shape_of(source) == (*lead, rows, width) and shape_of(flat) == (batch, rows, width)
    return source if fits else None


def _joins_heads(output: ir.Value) -> ir.Value | None:
    """[B, S, H*D] that is made of [B, H, S, D] and nothing else of it, or None."""
    turn = _reader(output, "Transpose")
    if turn is None or _transposed(turn.outputs[0], HEADS) is None:
        return None
    join = _reader(turn.outputs[0], "Reshape")
    batch, heads, rows, width = shape_of(output)
    return join.outputs[0] if join is not None and shape_of(join.outputs[0]) == (batch, rows, heads * width) else None
