"""W -> DequantizeLinear(values, scales): weights in few bits, activations in the type that they had.

A scale has the weight's own float type: TensorRT computes whatever follows in the type of the scales. It belongs to one
output channel, or to a block of one. Values are symmetric, and so there is no zero point. Both are placeholders as the
weight was, named as `precision.stored` says; `weights.derived` computes them.

1. The constant weight of a Conv, ConvTranspose, Gemm or MatMul is read through a DequantizeLinear. A Transpose between
   weight and MatMul stays behind it.
2. First and last convolution, embeddings, shortcuts and final projections are left alone, by their names in diffusers.
3. So is a weight of fewer than `SMALLEST` elements, one that is read twice, and what `exclude` names.
4. A weight that was quantised before is no float, and is left alone.
5. Blocks lie along the inputs of a product. Convolutions, which have no such axis, are left alone, and so are weights
   whose inputs are not whole blocks. The graph is then of opset 21 at least, which has blocks.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import onnx_ir as ir

from toolchain.graph.opset import raise_opset
from toolchain.graph.placeholder import add_weight, is_weight, static_shape
from toolchain.graph.transpose import SUFFIX
from toolchain.graph.upsample import SUFFIX as UPSAMPLED
from toolchain.precision.stored import DTYPES, SCALES, Bits, Form, Stored

BLOCKS_SINCE = 21
SMALLEST = 4096
"""Elements: a smaller weight would save less than 12 KiB for an operator more."""
SENSITIVE = {
    "first or last convolution": ("conv_in", "conv_out"),
    "embedding": (
        *("time_embedding", "time_emb_proj", "time_text_embed", "add_embedding", "pos_embed", "x_embedder"),
        *("context_embedder", "patch_embedding"),
    ),
    "shortcut": ("conv_shortcut",),
    "final projection": ("norm_out", "text_projection", "visual_projection"),
}
"""Why a module stays as it is -> its name, anywhere in the dotted path. NVIDIA's own lists for diffusers leave them."""
FINAL = "proj_out"
"""A final projection where it is the whole path; within blocks it is an ordinary linear."""
CONVOLUTIONS = ("Conv", "ConvTranspose")
INT8 = Form()


@dataclass(frozen=True)
class Survey:
    """The weights of matrix products and convolutions, by their names in the checkpoint.

    bits       the type of those that are quantised
    quantized  their names
    left       the others, with the reason
    """

    bits: Bits
    quantized: tuple[str, ...]
    left: Mapping[str, str]

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump: how many, of how many, and the names that were left by reason."""
        reasons: dict[str, list[str]] = {}
        for name, reason in self.left.items():
            reasons.setdefault(reason, []).append(name)
        count = len(self.quantized)
        return {"type": self.bits, "weights": count, "of": count + len(self.left), "left": reasons}


@dataclass(frozen=True)
class _Weight:
    """A constant weight: the node that reads it, a Transpose perhaps, its axis of output channels, and the convolution
    or product that multiplies with it."""

    value: ir.Value
    reader: ir.Node
    axis: int
    product: ir.Node

    @property
    def name(self) -> str:
        """In the checkpoint."""
        return str(self.value.name).removesuffix(SUFFIX).removesuffix(UPSAMPLED)


def survey(model: ir.Model, exclude: Sequence[str], form: Form = INT8) -> Survey:
    """What `quantize_weights` does to a graph that it was not applied to yet."""
    reasons = {weight.name: reason for weight, reason in _judged(model, exclude, form)}
    left = {name: reason for name, reason in reasons.items() if reason is not None}
    return Survey(form.bits, tuple(name for name in reasons if name not in left), left)


def quantize_weights(model: ir.Model, exclude: Sequence[str], form: Form = INT8) -> ir.Model:
    """A copy with its large weights in `form`; `exclude` are dotted module names or fnmatch patterns."""
    model = raise_opset(model, BLOCKS_SINCE) if form.block else model.clone()
    for weight, reason in _judged(model, exclude, form):
        if reason is None:
            _dequantize(model.graph, weight, form)
    return model


def dequantized_weights(model: ir.Model) -> dict[str, Stored]:
    """Every weight that is read through a DequantizeLinear, by the name that its initializer had."""
    weights = {}
    kinds = {dtype: kind for kind, dtype in DTYPES.items()}
    for node in model.graph:
        value = node.inputs[0] if node.op_type == "DequantizeLinear" else None
        if value is not None and is_weight(value) and value.dtype in kinds:
            kind, block = kinds[value.dtype], node.attributes.get("block_size")
            name = str(value.name).removesuffix(f".{kind}")
            axis = node.attributes["axis"].as_int()
            weights[name] = Stored(kind, _shape(value), axis, block.as_int() if block is not None else 0)
    return weights


def weighted(model: ir.Model) -> Iterator[tuple[str, ir.Node]]:
    """Every convolution and matrix product with a constant weight, after the weight's name in the checkpoint."""
    return ((weight.name, weight.product) for weight in _weights(model))


def _weights(model: ir.Model) -> Iterator[_Weight]:
    for node in model.graph:
        if node.domain or len(node.inputs) < 2:
            continue
        value, reader = node.inputs[1], node
        before = value.producer() if value is not None and node.op_type == "MatMul" else None
        flipped = before is not None and before.op_type == "Transpose" and _swaps(before)
        if before is not None and flipped:
            value, reader = before.inputs[0], before
        axis = _axis(node, flipped)
        if axis is None or value is None or not is_weight(value):
            continue
        if node.op_type in CONVOLUTIONS or len(_shape(value)) == 2:
            yield _Weight(value, reader, axis, node)


def _swaps(transpose: ir.Node) -> bool:
    perm = transpose.attributes.get("perm")
    return perm is not None and list(perm.as_ints()) == [1, 0]


def _axis(node: ir.Node, flipped: bool) -> int | None:
    """Of output channels in the weight of a node; None where the node has no such weight."""
    if node.op_type == "Gemm":
        transposed = node.attributes.get("transB")
        return 0 if transposed is not None and transposed.as_int() else 1
    return {"Conv": 0, "ConvTranspose": 1, "MatMul": 0 if flipped else 1}.get(node.op_type)


def _shape(value: ir.Value) -> tuple[int, ...]:
    assert value.const_value is not None
    return static_shape(value.const_value)


def _judged(model: ir.Model, exclude: Sequence[str], form: Form) -> list[tuple[_Weight, str | None]]:
    """Every weight, and why it is left alone, or None."""
    convolutions = [node for node in model.graph if node.op_type in CONVOLUTIONS]
    ends = {*convolutions[:1], *convolutions[-1:]}
    return [(weight, _reason(weight, exclude, ends, form)) for weight in _weights(model)]


def _reason(weight: _Weight, exclude: Sequence[str], ends: Collection[ir.Node], form: Form) -> str | None:
    parts = weight.name.split(".")[:-1]
    modules = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if any(fnmatch.fnmatchcase(module, pattern) for module in modules for pattern in exclude):
        return "excluded"
    for reason, names in SENSITIVE.items():
        if any(name in parts for name in names):
            return reason
    if parts == [FINAL]:
        return "final projection"
    if weight.reader in ends:
        return "first or last convolution"
    turned = weight.reader.outputs if weight.reader.op_type == "Transpose" else ()
    if any(len(value.uses()) > 1 for value in (weight.value, *turned)):
        return "read twice"
    shape = _shape(weight.value)
    if prod(shape) < SMALLEST:
        return "small"
    if form.block and weight.reader.op_type in CONVOLUTIONS:
        return "convolution"
    return f"no whole blocks of {form.block}" if form.block and shape[1 - weight.axis] % form.block else None


def _dequantize(graph: ir.Graph, weight: _Weight, form: Form) -> None:
    """Puts the DequantizeLinear between a weight and its reader."""
    value, shape = weight.value, _shape(weight.value)
    assert value.const_value is not None
    dtype = value.const_value.dtype
    stored = Stored(form.bits, shape, 1 - weight.axis if form.block else weight.axis, form.block)
    values = add_weight(graph, f"{value.name}.{form.bits}", DTYPES[form.bits], shape)
    scales = add_weight(graph, f"{value.name}{SCALES}", dtype, stored.scales_shape)
    attributes = {"axis": stored.axis} | ({"block_size": form.block} if form.block else {})
    node = ir.node("DequantizeLinear", [values, scales], attributes, name=f"{value.name}.dequantize")
    output = node.outputs[0]
    output.name, output.shape, output.type = f"{value.name}.dequantized", ir.Shape(shape), ir.TensorType(dtype)
    graph.insert_before(weight.reader, node)
    ir.convenience.replace_all_uses_with(value, output)
    del graph.initializers[str(value.name)]
