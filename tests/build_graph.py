"""A tiny network as a weightless graph beside its weight file, for tests of TensorRT's builder."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from onnx import TensorProto, helper, numpy_helper

from toolchain.recipe.options import BackendOptions, TensorRtOptions, TensorRtRtxOptions
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.weights.safetensors import write_safetensors

SPEC = GraphSpec((TensorSpec("x", "float32", (2, 4)),), (TensorSpec("y", "float32", (2, 4)),))
X = np.arange(8, dtype=np.float32).reshape(2, 4) / 8
KINDS = {
    "float32": (TensorProto.FLOAT, "F32", np.float32),
    "float16": (TensorProto.FLOAT16, "F16", np.float16),
    "bfloat16": (TensorProto.BFLOAT16, "BF16", ml_dtypes.bfloat16),
}
WEIGHTS = {name: np.roll(np.diag(np.float32([1, 2, 0.5, 1])), shift, 1) for shift, name in enumerate("abc")}
Y = X @ WEIGHTS["a"] @ WEIGHTS["b"] @ WEIGHTS["c"].T


def options(backend: str = "tensorrt", **given: Any) -> Any:
    """The table of a backend in a recipe."""
    made: BackendOptions = {"tensorrt": TensorRtOptions, "tensorrt_rtx": TensorRtRtxOptions}[backend](**given)
    return made


def write_network(folder: Path, dtype: str = "float16", *, idle: int = 0) -> None:
    """y = x @ a @ b @ c.T, its products in `dtype`, as graph.onnx and weights.safetensors.

    idle: how many nodes more it has that change nothing, for a build that takes a while.
    """
    kind, name, numpy = KINDS[dtype]
    write_safetensors(
        folder / "weights.safetensors",
        [(key, name, w.shape) for key, w in WEIGHTS.items()],
        lambda key: WEIGHTS[key].astype(numpy).tobytes(),
    )
    names = ["xc", *(f"idle{i}" for i in range(idle))]
    nodes = [
        helper.make_node("Cast", ["x"], ["xc"], name="cast_in", to=kind),
        *(helper.make_node("Add", [n, "zero"], [m], name=m) for n, m in pairwise(names)),
        helper.make_node("MatMul", [names[-1], "a"], ["xa"], name="first"),
        helper.make_node("MatMul", ["xa", "b"], ["xb"], name="second"),
        helper.make_node("Transpose", ["c"], ["ct"], name="turn", perm=[1, 0]),
        helper.make_node("MatMul", ["xb", "ct"], ["yc"], name="third"),
        helper.make_node("Cast", ["yc"], ["y"], name="cast_out", to=TensorProto.FLOAT),
    ]
    write_graph(folder / "graph.onnx", nodes, kind)


def write_two_buckets(folder: Path, dtype: str = "float16") -> list[GraphSpec]:
    """`write_network` as one graph for two and for three rows; the signatures of both."""
    import onnx_ir as ir

    from toolchain.graph.profiles import merge_buckets

    write_network(folder, dtype)
    graphs, specs = [], []
    for rows in (2, 3):
        graph = ir.load(folder / "graph.onnx")
        for value in (*graph.graph.inputs, *graph.graph.outputs):
            value.shape = ir.Shape((rows, 4))
        graphs.append(graph)
        specs.append(GraphSpec(*((TensorSpec(name, "float32", (rows, 4)),) for name in "xy")))
    ir.save(merge_buckets(graphs), folder / "graph.onnx")
    return specs


def write_graph(path: Path, nodes: list[Any], kind: int, opset: int = 20) -> None:
    x, y = (helper.make_tensor_value_info(t.name, TensorProto.FLOAT, t.shape) for t in (*SPEC.inputs, *SPEC.outputs))
    zero = helper.make_tensor("zero", kind, [], [0.0])
    graph = helper.make_graph(nodes, "tiny", [x], [y], [*(_weightless(n, kind) for n in WEIGHTS), zero])
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    path.write_bytes(made.SerializeToString())


def _weightless(name: str, kind: int) -> Any:
    tensor = numpy_helper.from_array(np.zeros((4, 4), np.float32), name)
    tensor.data_type = kind
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights"), ("offset", "0"), ("length", str(16 * (4 if kind == 1 else 2)))):
        tensor.external_data.add(key=key, value=value)
    return tensor
