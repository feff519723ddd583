"""A component as a device computes it: every value rounded to the type that the recipe gives it.

Engines do not show it everywhere. ONNX Runtime has no float16 kernels for most operators on a CPU and computes runs
of them in float32, so that a value beyond 65504, which is infinite on a GPU, passes. torch rounds what each operator
gives.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from toolchain.check.measure import Arrays, Feed, call, measure
from toolchain.check.report import Entry
from toolchain.models.component import Component
from toolchain.models.source import ModelSource
from toolchain.recipe import Recipe, Tolerance
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

ROUNDED = 3
"""Inputs of each engine that are computed so, evenly spaced: the first and the last of a trajectory, and its middle."""
NAMED = 8
aten = torch.ops.aten
PRODUCTS = {
    aten.convolution.default,
    aten.addmm.default,
    aten.mm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
}
"""Summed in float32 and rounded once, as on a GPU: torch's own kernels for a CPU are slow in the small types."""


class RoundedComponent:
    """A component in the recipe's types, with the weights of its `reference`, built when it is first compared."""

    def __init__(self, component: Component, source: ModelSource, recipe: Recipe, reference: nn.Module) -> None:
        self.component, self.source, self.recipe, self.reference = component, source, recipe, reference
        self.dtype = recipe.component(component.name).dtype
        self._rounded: nn.Module | None = None

    def compare(
        self, label: str, spec: GraphSpec, feeds: Sequence[Feed], references: Sequence[Arrays], tolerance: Tolerance
    ) -> list[Entry]:
        """Entries of some of the feeds and of every floating output; `references` are float32's. Those that fail tell
        what to keep in float32."""
        entries = []
        for index in sorted({round(i * (len(feeds) - 1) / (ROUNDED - 1)) for i in range(ROUNDED)}):
            feed = feeds[index]
            outputs = self._call(spec, feed.inputs)
            for tensor in spec.outputs:
                reference = references[index][tensor.name]
                if not np.issubdtype(reference.dtype, np.floating):
                    continue
                metrics, limits, failed = measure(reference, outputs[tensor.name], tolerance)
                note = self._advice(spec, feed.inputs, "finite" in failed) if failed else ""
                name = f"{tensor.name}, every value in {self.dtype}"
                where = (self.component.name, label, feed.label, name)
                entries.append(Entry(*where, metrics, limits, failed, feed.evaluation, note))
        return entries

    def _call(self, spec: GraphSpec, inputs: Mapping[str, Any]) -> Arrays:
        with _Products():  # type: ignore[no-untyped-call]
            return call(self._built(), spec, inputs)

    def _built(self) -> nn.Module:
        if self._rounded is None:
            self._rounded = self.component.module(self.source, self.recipe)
            self._rounded.load_state_dict(self.reference.state_dict())
        return self._rounded

    def _network(self, module: nn.Module) -> nn.Module:
        return module.get_submodule(self.component.prefix.rstrip("."))

    def _advice(self, spec: GraphSpec, inputs: Mapping[str, Any], overflows: bool) -> str:
        if not overflows:
            return f"no value leaves the range of {self.dtype}: precision is lost, not range"
        names = self._too_large(spec, inputs)
        if names is None:
            names = self.first_not_finite(spec, inputs)
        if not names:
            return f'components.{self.component.name}.dtype = "float32"'
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        listed = ", ".join(f'"{name}"' for name in names[:NAMED])
        return f"components.{self.component.name}.keep_float32 = [{listed}]{more}"

    def _too_large(self, spec: GraphSpec, inputs: Mapping[str, Any]) -> list[str] | None:
        """See `Watch.modules`."""
        with Watch(self._network(self.reference), float(torch.finfo(getattr(torch, self.dtype)).max)) as watch:
            call(self.reference, spec, inputs)
        return watch.modules()

    def first_not_finite(self, spec: GraphSpec, inputs: Mapping[str, Any]) -> list[str]:
        """The module inside which a value that no module gives becomes too large; none where there is no such."""
        overflowing: list[str] = []

        def hook(name: str, given: Any, output: Any) -> None:
            if not overflowing and name and _largest(output) == torch.inf and _largest(given) < torch.inf:
                overflowing.append(name)

        with _watched(self._network(self._built()), hook):
            self._call(spec, inputs)
        return overflowing

    def is_finite(self, spec: GraphSpec, inputs: Mapping[str, Any]) -> bool:
        """Whether every floating output is finite."""
        outputs = self._call(spec, inputs).values()
        return all(np.isfinite(o).all() for o in outputs if np.issubdtype(o.dtype, np.floating))


class Watch:
    """Watches which modules of a network give values that a type cannot hold, over all calls while it is entered.

    limit    of the type
    largest  by module: the largest magnitude that it was given or gave
    """

    def __init__(self, network: nn.Module, limit: float) -> None:
        self.limit = limit
        self.largest: dict[str, float] = {}
        self._fits: dict[str, bool] = {}
        self._gives: dict[str, bool] = {}
        self._watching = _watched(network, self._see)

    def __enter__(self) -> Watch:
        self._watching.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._watching.__exit__(*error)

    def _see(self, name: str, given: Any, output: Any) -> None:
        gives, takes = _largest(output), _largest(given)
        self._gives[name] = self._gives.get(name, True) and gives <= self.limit
        self._fits[name] = self._fits.get(name, True) and self._gives[name] and takes <= self.limit
        self.largest[name] = max(self.largest.get(name, 0.0), gives, takes)

    def modules(self) -> list[str] | None:
        """The smallest modules around the values that the type cannot hold, which take and give only values that it
        can: kept in float32, nothing overflows between them.

        Empty where only the whole network encloses them, such as in a residual stream; None where no module gives such
        a value.
        """
        around = {_enclosing(name, self._fits) for name, fit in self._gives.items() if not fit}
        if not around:
            return None
        if "" in around:
            return []
        return sorted(name for name in around if not any(name.startswith(f"{outer}.") for outer in around))

    def reached(self, module: str) -> float:
        """The largest magnitude in a module and those inside it."""
        inside = (v for name, v in self.largest.items() if name == module or name.startswith(f"{module}."))
        return max(self.largest.values() if not module else inside, default=0.0)


def _enclosing(name: str, fits: Mapping[str, bool]) -> str:
    """The innermost module from `name` outwards that takes and gives what the type can hold; "" for none."""
    while name and not fits.get(name, False):  # lists of modules are never called, and have no entry
        name = name.rpartition(".")[0]
    return name


def _largest(tree: Any) -> float:
    """The largest magnitude of the tensors in a tree, infinite where one holds NaN; 0 without tensors."""
    tensors = [x for x in pytree.tree_leaves(tree) if isinstance(x, Tensor) and x.is_floating_point() and x.numel()]
    largest = [float(x.abs().max()) for x in tensors]
    return max((torch.inf if np.isnan(value) else value for value in largest), default=0.0)


@contextmanager
def _watched(network: nn.Module, hook: Any) -> Iterator[None]:
    """Calls `hook` with name, arguments and output of every module, the inner before the outer."""

    def hooked(name: str) -> Any:
        return lambda _, args, kwargs, output: hook(name, (args, kwargs), output)

    handles: list[RemovableHandle] = [
        module.register_forward_hook(hooked(name), with_kwargs=True) for name, module in network.named_modules()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class _Products(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Computes `PRODUCTS` of small floating types in float32, and rounds their results."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        small = [x.dtype for x in pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.itemsize == 2]
        if func not in PRODUCTS or not small:
            return func(*args, **kwargs)

        def cast(tree: Any, dtype: torch.dtype) -> Any:
            return pytree.tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, tree)

        return cast(func(*cast(args, torch.float32), **cast(kwargs, torch.float32)), small[0])
