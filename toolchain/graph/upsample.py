"""Conv(Resize(x)) -> a convolution before upsampling: a 3x3 kernel over doubled pixels meets four different ones.

Nearest upsampling writes each pixel four times, and a 3x3 kernel over the result multiplies each with the sum of up to
four of its weights. Sums of weights, made once, save five of nine multiply-accumulates:

1. A Conv of 3x3, with stride 1 and padding 1, that alone reads a Resize to nearest of twice the height and width,
   becomes a Conv of 2x2 with four times as many channels, one for each place in a block of 2x2 pixels, and a
   DepthToSpace. Its weight is `folded`, an initializer of its own, named with `SUFFIX`.
2. Other convolutions, a Resize that something else reads too, and a weight that is not read as it is (one that is
   quantised), are left alone.
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from toolchain.graph.insert import Inserter, replace_value, shape_of
from toolchain.graph.placeholder import add_weight, is_weight

SUFFIX = ".upsampled"
NEAREST = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
PADS = [1, 1, 1, 1]
TAPS = {0: ([0], [1, 2]), 1: ([0, 1], [2])}
"""By the place of a pixel in its block: which taps of a kernel meet the pixel before it, and which the next one."""


def fold_upsampling(model: ir.Model) -> ir.Model:
    """A copy with every such pair in place of 1."""
    model = model.clone()
    for node in list(model.graph):
        source = _doubled(node)
        if source is not None:
            _replace(model.graph, node, source)
    common.RemoveUnusedNodesPass()(model)
    return model


def folded(weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """[O, I, 3, 3] -> [4 O, I, 2, 2]: the kernels of upper left, upper right, lower left and lower right pixels."""
    kernels = []
    for rows in TAPS.values():
        summed = np.stack([weight[:, :, taps].sum(axis=2) for taps in rows], axis=2)
        for columns in TAPS.values():
            kernels.append(np.stack([summed[..., taps].sum(axis=3) for taps in columns], axis=3))
    return np.concatenate(kernels)


def _doubled(node: ir.Node) -> ir.Value | None:
    """What a convolution of case 1 is computed of, before it is upsampled; None for other nodes."""
    resize = node.inputs[0].producer() if node.op_type == "Conv" and node.inputs[0] is not None else None
    if resize is None or resize.op_type != "Resize" or not is_weight(node.inputs[1]) or resize.inputs[0] is None:
        return None
    before, after = shape_of(resize.inputs[0]), shape_of(resize.outputs[0])
    doubled = len(before) == 4 and after == (*before[:2], 2 * before[2], 2 * before[3])
    nearest = all(resize.attributes.get_string(name) == mode for name, mode in NEAREST.items())
    alone = len(resize.outputs[0].uses()) == 1 and not resize.outputs[0].is_graph_output()
    return resize.inputs[0] if doubled and nearest and alone and _is_plain(node) else None


def _is_plain(convolution: ir.Node) -> bool:
    """Of 3x3, with stride 1 and padding 1."""
    attributes, weight = convolution.attributes, convolution.inputs[1]
    same = list(attributes.get_ints("pads", [0] * 4)) == PADS
    same = same and all(list(attributes.get_ints(name, [1, 1])) == [1, 1] for name in ("strides", "dilations"))
    grouped = attributes.get_int("group", 1) != 1 or attributes.get_string("auto_pad", "NOTSET") != "NOTSET"
    return same and not grouped and weight is not None and shape_of(weight)[2:] == (3, 3)


def _replace(graph: ir.Graph, node: ir.Node, source: ir.Value) -> None:
    weight, (batch, _, height, width) = node.inputs[1], shape_of(source)
    assert weight is not None
    assert weight.dtype is not None
    channels, inputs = shape_of(weight)[:2]
    name = f"{weight.name}{SUFFIX}"
    made = graph.initializers.get(name) or add_weight(graph, name, weight.dtype, (4 * channels, inputs, 2, 2))
    before = Inserter(node)
    bias = [before.add("Concat", [b] * 4, (4 * channels,), {"axis": 0}) for b in node.inputs[2:] if b is not None]
    wider = (batch, 4 * channels, height + 1, width + 1)
    sums = before.add("Conv", [source, made, *bias], wider, {"pads": PADS})
    parts = []
    for place, (row, column) in enumerate((r, c) for r in (0, 1) for c in (0, 1)):
        starts, sizes = (place * channels, row, column), (channels, height, width)
        ends = tuple(start + size for start, size in zip(starts, sizes, strict=True))
        limits = [before.constant(np.array(ints, np.int64)) for ints in (starts, ends, (1, 2, 3))]
        parts.append(before.add("Slice", [sums, *limits], (batch, *sizes), {}))
    stacked = before.add("Concat", parts, (batch, 4 * channels, height, width), {"axis": 1})
    shape = (batch, channels, 2 * height, 2 * width)
    replace_value(node.outputs[0], before.add("DepthToSpace", [stacked], shape, {"blocksize": 2}))
    convolution = sums.producer()
    assert convolution is not None
    convolution.name = node.name  # by which executed layers are found
