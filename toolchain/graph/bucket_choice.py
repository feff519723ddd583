"""Values that a graph for several buckets chooses by the shapes of its inputs.

What is chosen of shapes is made of the layers that TensorRT takes for that: Shape, Gather, Concat and integer
arithmetic, on no more than 64 elements. That is also how many buckets there may be.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from toolchain.errors import ExportError

Shapes = Sequence[tuple[int, ...]]
MOST = 64
RANK = 8
"""The longest vector of integers that is taken for a shape."""


class BucketChoice:
    """Makes the nodes and constants that choose. Node names begin with "bucket"."""

    def __init__(self, inputs: Sequence[ir.Value], buckets: Sequence[Shapes]) -> None:
        """`buckets` are the shapes of all inputs, bucket by bucket. ExportError for more than 64, and for two alike."""
        if len(buckets) > MOST:
            raise ExportError("too many buckets for one engine", expected=f"{MOST} or fewer", got=len(buckets))
        self.nodes: list[ir.Node] = []
        self.constants: list[ir.Value] = []
        self._values: dict[Any, ir.Value] = {}
        # TensorRT takes no shape of uint8.
        usable = [(v, shapes) for v, shapes in zip(inputs, zip(*buckets, strict=True), strict=True) if v.dtype != UINT8]
        self._sizes = {
            sizes: (value, axis)
            for value, shapes in usable
            for axis, sizes in enumerate(zip(*shapes, strict=True))
            if len(set(sizes)) > 1
        }
        self._number = self._count(usable)

    def of(self, arrays: Sequence[NDArray[Any]]) -> ir.Value:
        """The constant of the bucket at hand. All have one dtype and one rank; ExportError otherwise."""
        first = arrays[0]
        if len({(a.dtype, a.ndim) for a in arrays}) > 1:
            raise ExportError("the buckets cannot share an engine: constants of their graphs differ in type or rank")
        key = tuple((a.dtype, a.shape, a.tobytes()) for a in arrays)
        if key not in self._values:
            if len(set(key)) == 1:
                self._values[key] = self._constant(first)
            elif len({a.shape for a in arrays}) > 1:
                self._values[key] = self._piece(arrays)
            elif first.dtype == np.int64 and first.ndim == 1 and first.size <= RANK:
                sizes = [self._size(numbers) for numbers in zip(*map(np.ndarray.tolist, arrays), strict=True)]
                self._values[key] = self._node("Concat", sizes, axis=0)
            else:
                self._values[key] = self._gather(self._constant(np.stack(arrays)), self._number)
        return self._values[key]

    def _size(self, numbers: tuple[int, ...]) -> ir.Value:
        """One number of a shape, int64 [1]: fixed, the size of an input, or looked up."""
        if numbers not in self._values:
            if len(set(numbers)) == 1:
                size = self._constant(np.array(numbers[:1], np.int64))
            elif numbers in self._sizes:
                value, axis = self._sizes[numbers]
                size = self._gather(self._shape(value), self._constant(np.array([axis], np.int64)))
            else:
                size = self._gather(self._constant(np.array(numbers, np.int64)[:, None]), self._number)
            self._values[numbers] = size
        return self._values[numbers]

    def _piece(self, arrays: Sequence[NDArray[Any]]) -> ir.Value:
        """Constants of several shapes, one after the other in one tensor."""
        ends = list(itertools.accumulate(a.size for a in arrays))
        bounds = [self._size(tuple(b)) for b in ([0, *ends[:-1]], ends)]
        whole = self._constant(np.concatenate([a.ravel() for a in arrays]))
        piece = self._node("Slice", [whole, *bounds, self._constant(np.zeros(1, np.int64))])
        return self._node("Reshape", [piece, self.of([np.array(a.shape, np.int64) for a in arrays])])

    def _count(self, inputs: Sequence[tuple[ir.Value, Shapes]]) -> ir.Value:
        """The number of the bucket, int64 []: sum over buckets of number * (1 - min(1, |code - code of the bucket|)).

        The code is one number made of the sizes of an input that is of another shape in each bucket.
        """
        chosen = next(((value, shapes) for value, shapes in inputs if len(set(shapes)) == len(shapes)), None)
        if chosen is None:
            raise ExportError("the buckets cannot share an engine: no input tells them apart by its shape")
        value, sizes = chosen[0], np.array(chosen[1], np.int64)
        axes = [axis for axis in range(sizes.shape[1]) if len(set(sizes[:, axis])) > 1]
        scales = [int(np.prod(sizes[:, axes[:i]].max(axis=0) + 1)) for i in range(len(axes))]
        terms = [
            self._node("Mul", [self._gather(self._shape(value), self._scalar(axis)), self._scalar(scale)])
            for axis, scale in zip(axes, scales, strict=True)
        ]
        code = self._sum(terms)
        hits = []
        for number in range(1, len(sizes)):
            there = self._scalar(int(sizes[number, axes] @ scales))
            both = [self._node("Sub", pair) for pair in ([code, there], [there, code])]
            off = self._node("Min", [self._scalar(1), self._node("Max", both)])
            hits.append(self._node("Mul", [self._scalar(number), self._node("Sub", [self._scalar(1), off])]))
        return self._sum(hits)

    def _sum(self, terms: Sequence[ir.Value]) -> ir.Value:
        total = terms[0]
        for term in terms[1:]:
            total = self._node("Add", [total, term])
        return total

    def _shape(self, value: ir.Value) -> ir.Value:
        key = ("shape", value.name)
        if key not in self._values:
            self._values[key] = self._node("Shape", [value])
        return self._values[key]

    def _gather(self, table: ir.Value, index: ir.Value) -> ir.Value:
        return self._node("Gather", [table, index], axis=0)

    def _scalar(self, number: int) -> ir.Value:
        return self.of([np.array(number, np.int64)])

    def _constant(self, array: NDArray[Any]) -> ir.Value:
        tensor = ir.tensor(array, name=f"bucket_constant_{len(self.constants)}")
        kind = ir.TensorType(tensor.dtype)
        constant = ir.Value(name=tensor.name, shape=ir.Shape(array.shape), type=kind, const_value=tensor)
        self.constants.append(constant)
        return constant

    def _node(self, op_type: str, inputs: Sequence[ir.Value], **attributes: int) -> ir.Value:
        name = f"bucket_{op_type}_{len(self.nodes)}"
        output = ir.Value(name=f"{name}_output", type=inputs[0].type if op_type != "Shape" else INT64)
        self.nodes.append(ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output


INT64, UINT8 = ir.TensorType(ir.DataType.INT64), ir.DataType.UINT8
