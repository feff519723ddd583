"""Buffers: those of the checkpoint are weights by reference, those that are not in it must not be needed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.tiny import recipe_for
from toolchain.errors import ExportError
from toolchain.export.capture import capture
from toolchain.models.component import Component
from toolchain.models.construct import construct
from toolchain.models.hub import resolve_model
from toolchain.recipe import Bucket
from toolchain.signature import GraphSpec, TensorSpec
from toolchain.weights.derived import weight_uses

BUCKET = Bucket(1, 64, 64)
X = TensorSpec("x", "float32", (2, 3))
SPEC = GraphSpec((X,), (replace(X, name="y"),))


class Shifted(torch.nn.Module):
    """x + table, which is a buffer, times a parameter."""

    def __init__(self, persistent: bool) -> None:
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(3))
        self.register_buffer("table", torch.arange(6.0, dtype=torch.float32).reshape(2, 3), persistent=persistent)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + self.table) * self.scale  # type: ignore[operator]


class Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x).float()
        return result


def component(*, persistent: bool, dtype: str = "float32", kept: tuple[str, ...] = ()) -> Component:
    def module(*_: object) -> torch.nn.Module:
        return Wrapped(construct(lambda: torch.nn.Sequential(Shifted(persistent)), dtype, kept, "shifted"))

    return Component(
        name="shifted",
        folder="unet",
        prefix="inner.",
        per_bucket=True,
        spec=lambda *_: SPEC,
        module=module,
        reference=module,
    )


@pytest.mark.parametrize(
    ("dtype", "kept", "wanted"),
    [("float32", (), "F32"), ("float16", (), "F16"), ("bfloat16", (), "BF16"), ("float16", ("0",), "F32")],
)
def test_a_persistent_buffer_is_a_weight(tiny_model: Path, dtype: str, kept: tuple[str, ...], wanted: str) -> None:
    part = component(persistent=True, dtype=dtype, kept=kept)
    uses = weight_uses(capture(part, resolve_model(str(tiny_model)), recipe_for(), BUCKET))
    assert {(u.key, u.dtype, u.shape) for u in uses} == {("0.scale", wanted, (3,)), ("0.table", wanted, (2, 3))}


def test_another_buffer_has_no_values_and_is_refused(tiny_model: Path) -> None:
    with pytest.raises(ExportError, match="a buffer has no values") as caught:
        capture(component(persistent=False), resolve_model(str(tiny_model)), recipe_for(), BUCKET)
    assert caught.value.where == "inner.0.table"
