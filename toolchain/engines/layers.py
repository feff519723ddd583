"""The layers of an engine and the types that they compute in, compared with what the graph asked for.

A library builds an engine of another precision without a warning: a stray float32 scale or an option that a version no
longer has is enough, and the engine is right and slow. A node whose weight is float16 and whose layer knows nothing but
float32 is a fault.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolchain.errors import EngineError
from toolchain.store.files import some

if TYPE_CHECKING:
    import onnx_ir as ir

WEIGHTED = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
SHORT = frozenset({"float16", "bfloat16"})
# In this order: "bfloat16" and "fp16" both contain what stands further down.
SPELLINGS = (
    ("bfloat16", r"bfloat16|bf16"),
    ("float8", r"fp8|float8|e4m3"),
    ("float16", r"half|fp16|float16"),
    ("float32", r"float|fp32"),
    ("int8", r"\bint8"),
)
OPAQUE = 10
"""Nodes for each layer, from where on layers stand for whole graphs."""

NARROWEST = ("float8", "int8", "float16", "bfloat16", "float32")


@dataclass(frozen=True)
class Layer:
    """One layer of an engine: its kind in the library's words, the types of its tensors and weights, and the graph's
    nodes that it was made of."""

    name: str
    kind: str
    dtypes: frozenset[str]
    nodes: tuple[str, ...]

    @property
    def computes_in(self) -> str:
        """The smallest type that it touches: what is fused with a cast shows the wide one too. "other" for none."""
        return next((dtype for dtype in NARROWEST if dtype in self.dtypes), "other")


@dataclass(frozen=True)
class Precision:
    """What was asked for and what came out, by dtype.

    asked   weighted nodes of the graph
    layers  layers of the engine that touch the dtype; empty when the inspector tells no types
    named   how many weighted nodes some layer names
    wide    the nodes that asked for the dtype and run in layers that know nothing but float32
    """

    asked: Mapping[str, int]
    layers: Mapping[str, int]
    named: int
    wide: Mapping[str, tuple[str, ...]]

    @property
    def opaque(self) -> bool:
        """Whether the layers stand for whole graphs, of which they show no more than the ends."""
        return OPAQUE * sum(self.layers.values()) <= sum(self.asked.values())

    def to_json(self) -> dict[str, Any]:
        """As engine.json holds it."""
        wide = {dtype: list(names) for dtype, names in self.wide.items()}
        return {"asked": dict(self.asked), "layers": dict(self.layers), "wide": wide}


MOVES = {"Transpose": 0, "Reshape": 0, "Identity": 0, "Unsqueeze": 0, "Squeeze": 0, "DequantizeLinear": 1}
"""Operators that leave a weight's values as they are -> which of their inputs has the type that is computed in."""


def asked_dtypes(model: ir.Model) -> dict[str, str]:
    """Node -> dtype of its weight, for every convolution and product of a graph that reads a weight."""
    dtypes = {}
    for node in model.graph:
        if node.op_type in WEIGHTED and node.name:
            for value in node.inputs[:2]:
                dtype = _weight_dtype(value)
                if dtype is not None:
                    dtypes[node.name] = dtype
    return dtypes


def _weight_dtype(value: ir.Value | None) -> str | None:
    """The dtype of the weight behind a value, through what only moves it; None for an activation.

    What is computed with a quantised weight has the type of its scales.
    """
    from toolchain.graph.placeholder import is_weight

    while value is not None and not is_weight(value):
        node = value.producer()
        if node is None or node.op_type not in MOVES:
            return None
        value = node.inputs[MOVES[node.op_type]]
    return None if value is None or value.dtype is None else dtype_in(value.dtype.name)


def dtype_in(text: str) -> str | None:
    """The type that a library's word for it stands for; None for none of `SPELLINGS`."""
    return next((name for name, spelling in SPELLINGS if re.search(spelling, text, re.IGNORECASE)), None)


def count_layers(layers: list[Layer], fused_attention: int) -> dict[str, Any]:
    """For people: how many layers of each kind compute in which type, and how many are a whole attention."""
    kinds: dict[str, Counter[str]] = {}
    for layer in layers:
        kinds.setdefault(layer.kind, Counter())[layer.computes_in] += 1
    listed = {kind: dict(counts) for kind, counts in sorted(kinds.items())}
    return {"fused_attention": fused_attention, "kinds": listed}


def compare_precision(asked: Mapping[str, str], layers: list[Layer]) -> Precision:
    """What became of the dtypes of `asked`, node -> dtype."""
    of_node: dict[str, set[str]] = {}
    for layer in layers:
        for node in layer.nodes:
            of_node.setdefault(node, set()).update(layer.dtypes)
    wide: dict[str, tuple[str, ...]] = {}
    for node, dtype in asked.items():
        layer_dtypes = of_node.get(node, set())
        if dtype in SHORT and dtype not in layer_dtypes and "float32" in layer_dtypes:
            wide[dtype] = (*wide.get(dtype, ()), node)
    counted = Counter(dtype for layer in layers for dtype in layer.dtypes)
    named = sum(node in of_node for node in asked)
    return Precision(Counter(asked.values()), counted, named, wide)


def require_precision(precision: Precision, where: object, library: str) -> None:
    """EngineError when the engine as a whole is not what the graph asked for.

    Single layers are not held against it: one that is fused with the casts at the border of a graph shows float32 on
    both sides. It is an error when more than half of the nodes lost their dtype, or no layer at all touches it. A few
    layers that stand for a whole graph are forgiven: they show nothing but the graph's own ends.
    """
    for dtype in sorted(SHORT & precision.asked.keys()):
        asked, wide = precision.asked[dtype], precision.wide.get(dtype, ())
        lost = dtype not in precision.layers or 2 * len(wide) > asked
        if precision.layers and lost and not precision.opaque:
            counts = ", ".join(f"{count} in {name}" for name, count in sorted(precision.layers.items()))
            raise EngineError(
                f"{library} built the engine in another precision than the graph's {dtype}",
                where=where,
                expected=f"{asked} convolutions and products in {dtype}",
                got=f"layers: {counts}" + (f"; in float32 alone: {some(wide)}" if wide else ""),
                hint=f"do not use this version of {library} for the recipe, or set the component's dtype to float32",
            )
