"""What a layer costs: the multiply-accumulates that its constant weight takes part in, and the weight's elements."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import onnx_ir as ir

from toolchain.graph.placeholder import is_weight, static_shape
from toolchain.graph.transpose import SUFFIX

PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")


@dataclass(frozen=True)
class Cost:
    """Of one weight in one run of a graph."""

    macs: int
    elements: int


def costs(model: ir.Model) -> dict[str, Cost]:
    """Of every weight of a convolution or a matrix product in a graph of static shapes, before it is quantised, by its
    name in the checkpoint. A weight that is read twice costs twice."""
    by_name: dict[str, Cost] = {}
    for node in model.graph:
        value = node.inputs[1] if node.op_type in PRODUCTS and len(node.inputs) > 1 else None
        before = None if value is None else value.producer()
        if before is not None and before.op_type == "Transpose":
            value = before.inputs[0]
        if value is None or not is_weight(value) or value.const_value is None:
            continue
        shape = static_shape(value.const_value)
        name = str(value.name).removesuffix(SUFFIX)
        known = by_name.get(name, Cost(0, prod(shape)))
        by_name[name] = Cost(known.macs + _macs(node, shape), known.elements)
    return by_name


def _macs(node: ir.Node, weight: tuple[int, ...]) -> int:
    """Every element of a convolution's output takes one filter; one of a transposed convolution's input gives one; and
    every row of a product's input takes the whole matrix."""
    if node.op_type == "Conv":
        return _size(node.outputs[0]) * prod(weight[1:])
    if node.op_type == "ConvTranspose":
        return _size(node.inputs[0]) * prod(weight[1:])
    return _size(node.outputs[0]) // _shape(node.outputs[0])[-1] * prod(weight)


def _size(value: ir.Value | None) -> int:
    return prod(_shape(value))


def _shape(value: ir.Value | None) -> list[int]:
    assert value is not None
    assert value.shape is not None
    return [int(d) for d in value.shape if isinstance(d, int)]
