"""How a quantised weight lies in a weight file: its values in few bits, and their scales.

What a graph reads of a weight `NAME` are two initializers, `NAME.int8` or the like and `NAME.scales`. The passes name
them, `weights.derived` computes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Literal

import onnx_ir as ir

Bits = Literal["int8", "int4", "float8"]
SCALES = ".scales"
VALUES = ".int8"
"""The suffix of the values that integer products multiply with."""
FILE_DTYPES = {"int8": "I8", "int4": "U8", "uint4": "U8", "float8": "F8_E4M3"}
"""A type of values -> what a weight file calls it. It has no four bits: two values share a byte, the lower first."""
DTYPES: dict[Bits, ir.DataType] = {
    "int8": ir.DataType.INT8,
    "int4": ir.DataType.INT4,
    "float8": ir.DataType.FLOAT8E4M3FN,
}
"""A type of values -> ONNX's."""


@dataclass(frozen=True)
class Form:
    """What weights become. block: values along the inputs that share a scale; 0 for one scale per output channel."""

    bits: Bits = "int8"
    block: int = 0


@dataclass(frozen=True)
class Stored:
    """One quantised weight.

    kind   the type of its values. "uint4" is int4 plus 8, in the layout of MatMulNBits: [outputs, blocks, block / 2]
    shape  of the weight
    axis   of output channels where each has a scale; the one that is cut into blocks where `block` is not 0
    """

    kind: Literal["int8", "int4", "uint4", "float8"]
    shape: tuple[int, ...]
    axis: int
    block: int = 0

    @property
    def values_shape(self) -> tuple[int, ...]:
        """Of the values in a weight file."""
        if self.kind == "int4":
            return (prod(self.shape) // 2,)
        return (self.shape[0], self.shape[1] // self.block, self.block // 2) if self.kind == "uint4" else self.shape

    @property
    def scales_shape(self) -> tuple[int, ...]:
        """Of the scales."""
        if not self.block:
            return (self.shape[self.axis],)
        return tuple(size // self.block if axis == self.axis else size for axis, size in enumerate(self.shape))
