"""The numbered cases of `merge_buckets`, and what it refuses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest

from tests.graph.test_simplify import F32, constant, value, weight
from toolchain.errors import ExportError
from toolchain.graph import OPSET
from toolchain.graph.profiles import merge_buckets, read_profiles

I64 = ir.DataType.INT64
Build = Callable[[int, int], ir.Model]


def model(
    nodes: list[ir.Node], inputs: Sequence[ir.Value], outputs: Sequence[ir.Value], initializers: Sequence[ir.Value] = ()
) -> ir.Model:
    graph = ir.Graph(
        inputs, outputs, nodes=nodes, initializers=initializers, opset_imports={"": OPSET}, name="denoiser"
    )
    return ir.Model(graph, ir_version=10)


def flattened(batch: int, width: int) -> ir.Model:
    """y = reshape(x * scale, [batch, width * 3]) + bias: a shape, a number and an array depend on the bucket."""
    x, y = value("x", (batch, width, 3)), value("y", (batch, 3 * width))
    scale = constant("scale", np.float32(batch))
    target = constant("target", np.int64([batch, 3 * width]))
    bias = constant("bias", np.arange(3 * width, dtype=np.float32)[None] + batch)
    scaled = ir.node("Mul", [x, scale], outputs=[value("scaled", (batch, width, 3))], name="scale_it")
    flat = ir.node("Reshape", [scaled.outputs[0], target], outputs=[value("flat", (batch, 3 * width))], name="flatten")
    moved = ir.node("Add", [flat.outputs[0], bias], outputs=[y], name="move")
    return model([scaled, flat, moved], [x], [y], [scale, target, bias])


def run(made: ir.Model, **inputs: Any) -> list[Any]:
    session = onnxruntime.InferenceSession(ir.to_proto(made).SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, inputs))


def agree(build: Build, buckets: Sequence[tuple[int, int]], merged: ir.Model) -> None:
    """At each bucket's shapes the merged graph computes what the bucket's own computes."""
    for bucket in buckets:
        own = build(*bucket)
        rng = np.random.default_rng(0)
        inputs = {str(v.name): rng.standard_normal(v.shape.numpy(), np.float32) for v in own.graph.inputs}
        for expected, found in zip(run(own, **inputs), run(merged, **inputs), strict=True):
            np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "buckets", [[(1, 4), (2, 4)], [(1, 4), (1, 6), (2, 4)], [(2, 6), (1, 6), (1, 4), (3, 2)], [(1, 4), (4, 1)]]
)
def test_2_constants_are_those_of_the_bucket(buckets: list[tuple[int, int]]) -> None:
    merged = merge_buckets([flattened(*bucket) for bucket in buckets])
    agree(flattened, buckets, merged)
    assert read_profiles(merged) == [{"x": (batch, width, 3)} for batch, width in buckets]
    assert merged.graph.name == "denoiser"


def test_2_sizes_that_do_not_differ_stay_constants() -> None:
    """What TensorRT must know: 3 in [batch, width, 3], and the whole shape where batches alone differ."""
    merged = merge_buckets([flattened(1, 4), flattened(2, 4)])
    (x,) = merged.graph.inputs
    assert [d if isinstance(d, int) else str(d) for d in x.shape] == ["x_0", 4, 3]
    reshape = next(node for node in merged.graph if node.op_type == "Reshape")
    concat = reshape.inputs[1].producer()
    assert concat.op_type == "Concat"
    assert concat.inputs[1].const_value.numpy().tolist() == [12]
    # The batch is read off the input itself, and not looked up.
    assert concat.inputs[0].producer().inputs[0].producer().op_type == "Shape"


def test_2_shapes_are_computed_of_layers_that_tensorrt_takes_for_them() -> None:
    merged = merge_buckets([flattened(1, 4), flattened(1, 6), flattened(2, 4)])
    made = [node for node in merged.graph if str(node.name).startswith("bucket")]
    arithmetic = {"Add", "Sub", "Mul", "Min", "Max"}
    assert {node.op_type for node in made} <= {"Shape", "Gather", "Concat", "Slice", "Reshape"} | arithmetic
    small = [c.const_value for name, c in merged.graph.initializers.items() if name.startswith("bucket")]
    assert all(c.size <= 64 for c in small if c.dtype == I64)


def with_weight(batch: int, width: int) -> ir.Model:
    x, y = value("x", (batch, width)), value("y", (batch, width))
    w = weight("w", (1,))
    return model([ir.node("Mul", [x, w], outputs=[y], name="weigh")], [x], [y], [w])


def test_1_weights_are_shared() -> None:
    merged = merge_buckets([with_weight(1, 4), with_weight(2, 4)])
    weights = [v.name for v in merged.graph.initializers.values() if isinstance(v.const_value, ir.ExternalTensor)]
    assert weights == ["w"]


def repeated(batch: int, width: int) -> ir.Model:
    """y = x - expand(x[:1]), without the Expand for one row; z = -y[:, :4], without the Slice for four columns."""
    x, y, z = value("x", (batch, width)), value("y", (batch, width)), value("z", (batch, 4))
    first = constant("first", np.int64([0])), constant("one", np.int64([1])), constant("axis", np.int64([0]))
    row = ir.node("Slice", [x, *first], outputs=[value("row", (1, width))], name="row_of")
    shape, spread = constant("shape", np.int64([batch, width])), value("spread", (batch, width))
    nodes = [row]
    if batch > 1:
        nodes.append(ir.node("Expand", [row.outputs[0], shape], outputs=[spread], name="spread_it"))
    nodes.append(ir.node("Sub", [x, nodes[-1].outputs[0]], outputs=[y], name="less"))
    four, columns = constant("four", np.int64([4])), constant("columns", np.int64([1]))
    if width > 4:
        nodes.append(
            ir.node("Slice", [y, first[0], four, columns], outputs=[value("part", (batch, 4))], name="part_of")
        )
    nodes.append(ir.node("Neg", [nodes[-1].outputs[0]], outputs=[z], name="turn"))
    return model(nodes, [x], [y, z], [*first, shape, four, columns])


@pytest.mark.parametrize("buckets", list(itertools.permutations([(1, 4), (2, 4), (1, 6), (3, 8)], 3)))
def test_3_a_node_that_does_nothing_in_some_buckets(buckets: tuple[tuple[int, int], ...]) -> None:
    merged = merge_buckets([repeated(*bucket) for bucket in buckets])
    agree(repeated, buckets, merged)


def unary(kind: str, batch: int, width: int, **attributes: Any) -> ir.Model:
    x, y = value("x", (batch, width)), value("y", (batch, width))
    return model([ir.node(kind, [x], attributes, outputs=[y], name=f"{kind}_1")], [x], [y])


def other_weight(name: str, shape: tuple[int, ...], batch: int) -> ir.Model:
    x, y = value("x", (batch, 4)), value("y", (batch, 4))
    w = weight(name, shape)
    return model([ir.node("Mul", [x, w], outputs=[y], name="weigh")], [x], [y], [w])


def longer(batch: int) -> ir.Model:
    made = unary("Neg", batch, 4)
    (first,) = made.graph
    second = ir.node("Neg", [first.outputs[0]], outputs=[value("z", (batch, 4))], name="again")
    made.graph.append(second)
    return made


def other_input(batch: int, name: str = "x", rank: int = 2) -> ir.Model:
    x = value(name, (batch, 4, 1)[:rank])
    return model([ir.node("Neg", [x], outputs=[value("y", (batch, 4, 1)[:rank])], name="n")], [x], [value("y", (1,))])


def reading(which: int, batch: int) -> ir.Model:
    xs = [value("a", (batch, 4)), value("b", (batch, 4))]
    return model([ir.node("Neg", [xs[which]], outputs=[y := value("y", (batch, 4))], name="n")], xs, [y])


def turned(batch: int, crossed: bool) -> ir.Model:
    """p = -x, q = |x|, or the other way round under the same names."""
    x, p, q = value("x", (batch, 4)), value("p", (batch, 4)), value("q", (batch, 4))
    ends = (q, p) if crossed else (p, q)
    nodes = [ir.node(kind, [x], outputs=[end], name=kind) for kind, end in zip(("Neg", "Abs"), ends, strict=True)]
    return model(nodes, [x], [p, q])


def filled(batch: int, dtype: Any) -> ir.Model:
    """y = x + what one pattern of bits means in a dtype."""
    x, y = value("x", (batch,)), value("y", (batch,))
    bits = ir.tensor(np.array([0x3F800000], np.int32).view(dtype), name="bits")
    one = constant("one", np.int64([1]))
    made = value("made", (1,), ir.DataType.from_numpy(np.dtype(dtype)))
    fill = ir.node("ConstantOfShape", [one], {"value": bits}, outputs=[made], name="fill")
    cast = ir.node("Cast", [made], {"to": F32}, outputs=[value("c", (1,))], name="cast")
    return model([fill, cast, ir.node("Add", [x, cast.outputs[0]], outputs=[y], name="add")], [x], [y], [one])


REFUSED: dict[str, tuple[list[Callable[[], ir.Model]], str]] = {
    "another operator": ([lambda: unary("Neg", 1, 4), lambda: unary("Abs", 2, 4)], r"nodes .*(.|\n)*Neg Neg_1 and Abs"),
    "another attribute": (
        [lambda: unary("Softmax", 1, 4, axis=0), lambda: unary("Softmax", 2, 4, axis=1)],
        r"nodes(.|\n)*Softmax_1",
    ),
    "one node more": ([lambda: unary("Neg", 1, 4), lambda: longer(2)], "nothing and Neg again"),
    "another weight": ([lambda: other_weight("v", (1,), 1), lambda: other_weight("w", (1,), 2)], "inputs(.|\n)*weigh"),
    "a weight's shape": (
        [lambda: other_weight("w", (1,), 1), lambda: other_weight("w", (4,), 2)],
        "inputs(.|\n)*weigh",
    ),
    "an input's name": ([lambda: other_input(1), lambda: other_input(2, "u")], "ends of the graph"),
    "an input's rank": ([lambda: other_input(1), lambda: other_input(2, rank=3)], "ends of the graph"),
    "another wire": ([lambda: reading(0, 1), lambda: reading(1, 2)], "inputs(.|\n)*Neg n"),
    "crossed outputs": ([lambda: turned(1, False), lambda: turned(2, True)], "outputs of their graphs differ"),
    "an attribute's type": ([lambda: filled(1, np.float32), lambda: filled(2, np.int32)], "nodes(.|\n)*fill"),
    "the same shapes": ([lambda: unary("Neg", 1, 4), lambda: unary("Neg", 1, 4)], "no input tells them apart"),
    "too many buckets": ([lambda i=i: unary("Neg", i + 1, 4) for i in range(65)], "too many buckets"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_4_what_differs_in_another_way(case: str) -> None:
    builds, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        merge_buckets([build() for build in builds])


def alone(batch: int, width: int) -> ir.Model:
    """y = x + expand(r, x.shape) + expand(c, x.shape), each Expand left out where it does nothing."""
    x, y = value("x", (batch, width)), value("y", (batch, width))
    one, shape = constant("one", np.float32([[1]])), constant("shape", np.int64([batch, width]))
    row, column = value("r", (1, width)), value("c", (batch, 1))
    nodes, terms = [], []
    for name, source, small in (("row", row, batch == 1), ("column", column, width == 1)):
        made = value(f"{name}_all", (batch, width))
        if not small:
            nodes.append(ir.node("Expand", [source, shape], outputs=[made], name=f"expand_{name}"))
        terms.append(source if small else made)
    total = ir.node("Add", terms, outputs=[value("t", (batch, width))], name="sum")
    nodes += [total, ir.node("Mul", [x, one], outputs=[value("u", (batch, width))], name="same")]
    nodes.append(ir.node("Add", [nodes[-1].outputs[0], total.outputs[0]], outputs=[y], name="all"))
    return model(nodes, [x, row, column], [y], [one, shape])


def test_3_two_such_nodes_of_one_name() -> None:
    buckets = [(1, 1), (2, 1), (1, 3), (4, 2)]
    agree(alone, buckets, merge_buckets([alone(*bucket) for bucket in buckets]))


def indexed(batch: int) -> ir.Model:
    """y = x[:, table], the table of the bucket: integers that are no shape."""
    x, y = value("x", (batch, 100)), value("y", (batch, 90))
    table = constant("table", np.roll(np.arange(90), batch))
    return model([ir.node("Gather", [x, table], {"axis": 1}, outputs=[y], name="pick")], [x], [y], [table])


def test_2_a_long_vector_of_integers_is_no_shape() -> None:
    merged = merge_buckets([indexed(1), indexed(2)])
    agree(lambda batch, _: indexed(batch), [(1, 0), (2, 0)], merged)
    assert not any(node.op_type == "Concat" for node in merged.graph)


def test_sizes_that_go_together_have_one_name() -> None:
    """An engine may take two inputs of equal sizes for equal, and nothing for broadcast."""
    merged = merge_buckets([alone(1, 2), alone(2, 3)])
    dims = {v.name: [str(d) for d in v.shape] for v in (*merged.graph.inputs, *merged.graph.outputs)}
    assert dims == {"x": ["x_0", "x_1"], "r": ["1", "x_1"], "c": ["x_0", "1"], "y": ["x_0", "x_1"]}


def pictured(batch: int) -> ir.Model:
    """y = x + float(mean of p), p being uint8."""
    p, x, y = value("p", (batch, 2), ir.DataType.UINT8), value("x", (batch, 4)), value("y", (batch, 4))
    wide = ir.node("Cast", [p], {"to": F32}, outputs=[value("w", (batch, 2))], name="widen")
    shape, target = constant("shape", np.int64([batch, 2, 1])), value("s", (batch, 2, 1))
    turned_ = ir.node("Reshape", [wide.outputs[0], shape], outputs=[target], name="reshape")
    mean = ir.node("ReduceMax", [turned_.outputs[0]], {"keepdims": 0}, outputs=[value("m", ())], name="mean")
    nodes = [wide, turned_, mean, ir.node("Add", [x, mean.outputs[0]], outputs=[y], name="add")]
    return model(nodes, [p, x], [y], [shape])


def test_2_no_shape_is_taken_of_uint8() -> None:
    """TensorRT has uint8 at its ends alone, and for a Cast."""
    merged = merge_buckets([pictured(1), pictured(2)])
    assert [node.inputs[0].name for node in merged.graph if node.op_type == "Shape"] == ["x"]


def test_a_graph_of_one_bucket_has_no_profiles() -> None:
    assert read_profiles(flattened(1, 4)) == []
