"""Multiply-accumulates of layers, against a count by hand."""

from __future__ import annotations

import onnx_ir as ir

from tests.graph.test_simplify import model, value, weight
from toolchain.graph.transpose import transpose_weights
from toolchain.precision.cost import Cost, costs

FLOAT = ir.DataType.FLOAT


def layers() -> ir.Model:
    """A strided grouped convolution, a transposed one, and a linear as torch exports it, whose weight is read twice."""
    x, filters = value("x", (2, 8, 16, 16), FLOAT), weight("conv.weight", (12, 4, 3, 3))
    conv = ir.node("Conv", [x, filters], {"group": 2}, outputs=[value("c", (2, 12, 8, 8), FLOAT)])
    wide = weight("up.weight", (12, 6, 2, 2))
    up = ir.node("ConvTranspose", [conv.outputs[0], wide], outputs=[value("u", (2, 6, 16, 16), FLOAT)])
    matrix, rows = weight("linear.weight", (5, 7)), value("rows", (2, 3, 7), FLOAT)
    turned = ir.node("Transpose", [matrix], {"perm": [1, 0]}, outputs=[value("t", (7, 5), FLOAT)])
    products = [
        ir.node("MatMul", [rows, turned.outputs[0]], outputs=[value(f"p{i}", (2, 3, 5), FLOAT)]) for i in range(2)
    ]
    other = value("other", (2, 5, 3), FLOAT)
    attention = ir.node("MatMul", [products[0].outputs[0], other], outputs=[value("a", (2, 3, 3), FLOAT)])
    outputs = [up.outputs[0], products[1].outputs[0], attention.outputs[0]]
    return model([conv, up, turned, *products, attention], [x, rows, other], outputs, [filters, wide, matrix])


def test_costs_of_each_kind() -> None:
    expected = {
        "conv.weight": Cost(2 * 12 * 8 * 8 * 4 * 9, 12 * 4 * 9),
        "up.weight": Cost(2 * 12 * 8 * 8 * 6 * 4, 12 * 6 * 4),
        "linear.weight": Cost(2 * (2 * 3) * 5 * 7, 35),
    }
    assert costs(layers()) == expected
    assert costs(transpose_weights(layers())) == expected
