"""Initializers as ONNX's external data: a file, an offset and a length in place of the bytes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx_ir as ir

from toolchain.graph.placeholder import is_weight, static_shape
from toolchain.weights.mapped import TensorRef


def attach_weights(model: ir.Model, refs: Mapping[str, TensorRef], location: str, folder: Path | str = "") -> None:
    """Points every weight of a graph into the file `location`, where `refs` say, by the initializers' names.

    location  relative to the folder that the graph is saved in
    folder    where the file lies now, for a graph whose bytes are read before it is saved
    """
    for name, value in model.graph.initializers.items():
        if is_weight(value):
            point_into(value, refs[name], location, folder)


def point_into(value: ir.Value, ref: TensorRef, location: str, folder: Path | str = "") -> None:
    """Gives one initializer the bytes of `ref` in the file `location`; its type and shape stay."""
    tensor = value.const_value
    assert tensor is not None
    shape = ir.Shape(static_shape(tensor))
    value.const_value = ir.ExternalTensor(
        location, ref.offset, ref.nbytes, tensor.dtype, shape=shape, name=str(value.name), base_dir=folder
    )
