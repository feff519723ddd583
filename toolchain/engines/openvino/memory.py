"""What an opened engine of OpenVINO will keep in memory, computed from the model that it executes."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from typing import Any

ITEM_BYTES = {"f32": 4, "bf16": 2, "f16": 2, "i64": 8, "i32": 4, "i8": 1, "u8": 1, "boolean": 1, "i4": 0.5, "u4": 0.5}
PACKING = frozenset({"Convolution", "Deconvolution", "FullyConnected"})
"""Layers that keep a copy of their weight in the layout of their kernel."""
VIEWS = frozenset({"Reshape"})
KERNEL_BYTES = {"Subgraph": 340_000, **dict.fromkeys(PACKING, 65_000)}
"""What an opened model holds for a layer beside its tensors, by kind, on AVX-512; next to nothing for others. From 28
engines of tiny models and of `shapes`, in float32 and bfloat16: 6 to 55 MB each, forecast to a tenth for most."""


def memory_facts(compiled: Any, weight_bytes: int) -> dict[str, Any]:
    """For `engine.json`.

    mapped_bytes      of the weight file, all of which is read when the engine is opened
    packed_bytes      of the copies that convolutions and products keep of their weights
    session_bytes     of the model with its kernels
    activation_bytes  of tensors between the layers at peak
    arena_bytes       of what stays allocated for them: one block that is reused as they die
    """
    operators = sorted(compiled.get_runtime_model().get_ordered_ops(), key=_position)
    kinds = {operator: str(operator.get_rt_info()["layerType"].value) for operator in operators}
    weights = {source for o in operators if kinds[o] in PACKING for source in _sources(o) if kinds[source] == "Const"}
    activations = _peak_bytes([o for o in operators if kinds[o] not in ("Const", "Input", "Output")], kinds)
    return {
        "mapped_bytes": weight_bytes,
        "packed_bytes": sum(map(_nbytes, weights)),
        "session_bytes": sum(KERNEL_BYTES.get(kind, 0) for kind in kinds.values()),
        "activation_bytes": activations,
        "arena_bytes": activations,
    }


def _position(operator: Any) -> int:
    return int(operator.get_rt_info()["execOrder"].value)


def _sources(operator: Any) -> list[Any]:
    return [value.get_node() for value in operator.input_values()]


def _nbytes(operator: Any) -> int:
    """Of all outputs."""
    dtypes = str(operator.get_rt_info()["outputPrecisions"].value).split(",")
    sizes = (math.prod(output.get_shape()) for output in operator.outputs())
    return sum(math.ceil(size * ITEM_BYTES.get(dtype, 4)) for size, dtype in zip(sizes, itertools.cycle(dtypes)))


def _peak_bytes(operators: list[Any], kinds: dict[Any, str]) -> int:
    """Peak of what is alive between layers that run in this order; a view lies in what it is a view of."""
    owner: dict[Any, Any] = {}
    last: dict[Any, int] = {}
    for index, operator in enumerate(operators):
        sources = [owner[source] for source in _sources(operator) if source in owner]
        owner[operator] = sources[0] if kinds[operator] in VIEWS and sources else operator
        for source in (*sources, owner[operator]):
            last[source] = index
    changes: Counter[int] = Counter()
    for index, operator in enumerate(operators):
        if owner[operator] is operator:
            changes[index] += _nbytes(operator)
            changes[last[operator] + 1] -= _nbytes(operator)
    return max(itertools.accumulate(changes[index] for index in range(len(operators))), default=0)
