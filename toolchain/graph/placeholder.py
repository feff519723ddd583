"""Weights without values: in a graph only their names, dtypes and shapes exist until an engine attaches the bytes."""

from __future__ import annotations

import math

import onnx_ir as ir


def placeholder(name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.ExternalTensor:
    """A weight that points nowhere; `shape` is static."""
    size = math.prod(shape) * dtype.bitwidth // 8
    return ir.ExternalTensor("weights", 0, size, dtype, shape=ir.Shape(shape), name=name)


def add_weight(graph: ir.Graph, name: str, dtype: ir.DataType, shape: tuple[int, ...]) -> ir.Value:
    """A new initializer of a graph that points nowhere."""
    value = ir.Value(
        name=name, shape=ir.Shape(shape), type=ir.TensorType(dtype), const_value=placeholder(name, dtype, shape)
    )
    graph.register_initializer(value)
    return value


def is_weight(value: ir.Value | None) -> bool:
    """Whether a value is a weight: an initializer without bytes."""
    return value is not None and isinstance(value.const_value, ir.ExternalTensor)


def static_shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """The shape of a tensor as integers; a tensor of a graph with static shapes has no others."""
    return tuple(int(d) for d in tensor.shape if isinstance(d, int))
