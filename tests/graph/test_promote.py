"""The numbered cases of `promote_types`, and what torch's exporter leaves to it."""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
import torch
from torch import Tensor

from tests.graph.test_simplify import model, ops, value
from toolchain.graph.promote import promote_types
from toolchain.graph.simplify import simplify
from toolchain.graph.typed import check_types

F16, F32, BOOL = ir.DataType.FLOAT16, ir.DataType.FLOAT, ir.DataType.BOOL


def mixed(op: str, *inputs: ir.Value, out: ir.DataType, **attributes: int) -> ir.Model:
    shape = (4,) if op == "Concat" else (2,)
    made = ir.node(op, list(inputs), attributes, outputs=[value("y", shape, out)], name="mixed")
    return model([made], list(inputs), list(made.outputs), [])


def casts(found: ir.Model) -> list[tuple[str | None, ir.DataType]]:
    return [
        (node.inputs[0].name, ir.DataType(node.attributes["to"].as_int()))
        for node in found.graph
        if node.op_type == "Cast" and node.inputs[0] is not None
    ]


@pytest.mark.parametrize("op", ["Concat", "Add", "Mul", "Max"])
def test_1_the_input_of_another_type_is_cast(op: str) -> None:
    low, wide = value("low", (2,), F16), value("wide", (2,), F32)
    found = promote_types(mixed(op, low, wide, out=F32, **({"axis": 0} if op == "Concat" else {})))
    assert casts(found) == [("low", F32)]
    check_types(found)


def test_1_torch_says_which_type_it_is() -> None:
    """A tensor without dimensions does not widen another."""
    low, number = value("low", (2,), F16), value("number", (), F32)
    assert casts(promote_types(mixed("Add", low, number, out=F16))) == [("number", F16)]


@pytest.mark.parametrize(
    ("op", "types", "out", "expected"),
    [
        ("Where", (BOOL, F16, F32), F32, ["1"]),
        ("Pow", (F16, F32), F32, ["0"]),
        ("Pow", (F32, F16), F32, []),
        ("Less", (F32, F32), BOOL, []),
    ],
)
def test_2_an_input_with_a_type_of_its_own(
    op: str, types: tuple[ir.DataType, ...], out: ir.DataType, expected: list[str]
) -> None:
    inputs = [value(str(i), (2,), dtype) for i, dtype in enumerate(types)]
    found = promote_types(mixed(op, *inputs, out=out))
    assert casts(found) == [(name, F32) for name in expected]
    check_types(found)


def test_3_an_output_without_a_type() -> None:
    low, wide = value("low", (2,), F16), value("wide", (2,), F32)
    turned = ir.node("Neg", [low], outputs=[ir.Value(name="turned")])
    joined = ir.node("Concat", [turned.outputs[0], wide], {"axis": 0}, outputs=[value("y", (4,), F32)])
    found = promote_types(model([turned, joined], [low, wide], list(joined.outputs), []))
    assert casts(found) == [("turned", F32)]
    check_types(found)


def test_3_inputs_that_differ_do_not_say_what_is_meant() -> None:
    low, wide = value("low", (2,), F16), value("wide", (2,), F32)
    untyped = ir.node("Add", [low, wide], outputs=[ir.Value(name="y")])
    assert ops(promote_types(model([untyped], [low, wide], list(untyped.outputs), []))) == ["Add"]


def test_4_what_agrees_is_left_alone() -> None:
    one, other = value("one", (2,), F16), value("other", (2,), F16)
    assert ops(promote_types(mixed("Add", one, other, out=F16))) == ["Add"]


def test_4_another_domain_is_left_alone() -> None:
    low, wide = value("low", (2,), F16), value("wide", (2,), F32)
    foreign = ir.node("Add", [low, wide], outputs=[value("y", (2,), F32)], domain="com.microsoft")
    assert ops(promote_types(model([foreign], [low, wide], list(foreign.outputs), []))) == ["Add"]


PROMOTED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "concat": lambda low, wide: torch.concat([low, wide], dim=-1),
    "cat": lambda low, wide: torch.cat([wide, low]),
    "stack": lambda low, wide: torch.stack([low, wide]),
    "pow": lambda low, wide: low.pow(wide),
    "where": lambda low, wide: torch.where(wide > 0.5, low, wide),
    "add": lambda low, wide: low + wide,
    "add a number": lambda low, wide: low + wide.sum(),
    "maximum": lambda low, wide: torch.maximum(low, wide),
    "addcmul": lambda low, wide: torch.addcmul(low, wide, wide),
    "masked fill": lambda low, wide: low.masked_fill(wide > 0.5, 1.0) * wide,
    "integers": lambda low, wide: torch.concat([low.to(torch.int32), wide.to(torch.int64)]),
}


ONNX_NAMES = {
    torch.float16: "FLOAT16",
    torch.bfloat16: "BFLOAT16",
    torch.float32: "FLOAT",
    torch.int64: "INT64",
}


class Promotes(torch.nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, low: Tensor, wide: Tensor) -> Tensor:
        return self.function(low, wide)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("case", "dtype"), [*((case, torch.float16) for case in PROMOTED), ("concat", torch.bfloat16)], ids=str
)
def test_what_torch_promotes_is_typed_after_simplify(
    case: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.ERROR, logger="torch.onnx")
    torch.manual_seed(0)
    inputs = (torch.rand(2, 2).to(dtype), torch.rand(2, 2))
    expected = PROMOTED[case](*inputs)
    program = torch.export.export(Promotes(PROMOTED[case]), inputs, strict=False)
    exported = torch.onnx.export(program, inputs, opset_version=20, dynamo=True, optimize=False, verbose=False)
    assert exported is not None
    found = simplify(exported.model)
    check_types(found)
    (output,) = found.graph.outputs
    assert output.dtype == getattr(ir.DataType, ONNX_NAMES[expected.dtype])
    if dtype is torch.float16:  # of bfloat16 onnxruntime has few kernels for the CPU
        session = onnxruntime.InferenceSession(ir.to_proto(found).SerializeToString())
        (got,) = session.run(None, {"low": inputs[0].numpy(), "wide": inputs[1].numpy()})
        np.testing.assert_allclose(got, expected.numpy(), rtol=1e-3 if expected.dtype is dtype else 1e-6)
