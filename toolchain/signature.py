"""The signature of a graph: names, dtypes and static shapes of its inputs and outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a graph. `dtype` is numpy's name; every shape is static."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump."""
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorSpec:
        """The inverse of `to_json`. KeyError and TypeError for other data."""
        return cls(data["name"], data["dtype"], tuple(data["shape"]))


@dataclass(frozen=True)
class GraphSpec:
    """Inputs and outputs of a graph, in order."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain data for json.dump."""
        return {"inputs": [t.to_json() for t in self.inputs], "outputs": [t.to_json() for t in self.outputs]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> GraphSpec:
        """The inverse of `to_json`. KeyError and TypeError for other data."""
        inputs, outputs = (tuple(TensorSpec.from_json(t) for t in data[side]) for side in ("inputs", "outputs"))
        return cls(inputs, outputs)

    def input(self, name: str) -> TensorSpec:
        """The input of that name, which must exist."""
        return next(t for t in self.inputs if t.name == name)
