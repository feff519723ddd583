"""Candidates of a search: recipes that leave the first units of an order as they are; drawn when asked for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from toolchain.recipe import Quantize, Recipe
from toolchain.tune.pictures import Drawings, Measured, Request
from toolchain.tune.result import Point
from toolchain.tune.search import Order


def with_tables(recipe: Recipe, tables: Mapping[str, Quantize | None]) -> Recipe:
    """A recipe with other quantize tables; None removes one."""
    parts = {name: replace(recipe.component(name), quantize=table) for name, table in tables.items()}
    return replace(recipe, components={**recipe.components, **parts})


def plain_tables(tables: Mapping[str, Quantize]) -> dict[str, Quantize]:
    """With the largest ranges and scales, and without smoothing."""
    return {n: replace(table, scales="max", ranges="max", smoothing=0.0) for n, table in tables.items()}


def unquantised(recipe: Recipe) -> Recipe:
    """A recipe without any quantize table, and so without a calibration."""
    return replace(recipe.unquantized, calibration=None)


def searched(recipe: Recipe) -> dict[str, Quantize]:
    """The components whose layers are searched, with their tables: those that a picture from a text passes through and,
    where activations are rounded in some, those alone: only there the smaller type is computed with."""
    tables = {name: part.quantize for name, part in recipe.components.items() if name != "vae_encoder"}
    given = {name: table for name, table in tables.items() if table is not None}
    rounding = {name: table for name, table in given.items() if table.activations != "none"}
    return rounding or given


class Candidates:
    """Of `recipe`, whose tables are `tables` before anything is excluded beyond what they exclude themselves."""

    def __init__(
        self, recipe: Recipe, tables: Mapping[str, Quantize], order: Order, drawings: Drawings, request: Request
    ) -> None:
        self.recipe, self.tables, self.order = recipe, tables, order
        self.drawings, self.request = drawings, request
        self._points: dict[int, Point] = {}

    def build(self, excluded: int, tables: Mapping[str, Quantize] | None = None) -> Recipe:
        """The recipe of a candidate, with the options of `tables` in place of its own."""
        left: dict[str, list[str]] = {}
        for unit in self.order.units[:excluded]:
            left.setdefault(unit.component, []).append(unit.pattern)
        given = self.tables if tables is None else tables
        changed = {name: replace(t, exclude=(*t.exclude, *left.get(name, ()))) for name, t in given.items()}
        whole = {u.component for u in self.order.units[excluded:]}
        return with_tables(self.recipe, {name: t if name in whole else None for name, t in changed.items()})

    def point(self, excluded: int) -> Point:
        """A candidate with its pictures, measured once."""
        if excluded not in self._points:
            self._points[excluded] = self._measure(excluded, self.tables, self.request)
        return self._points[excluded]

    def points(self) -> list[Point]:
        """Those that were measured, in order."""
        return [self._points[excluded] for excluded in sorted(self._points)]

    def naive(self, excluded: int) -> Point:
        """A candidate with the largest ranges and scales."""
        return self._measure(excluded, plain_tables(self.tables), self.request)

    def held_out(self, excluded: int, request: Request) -> Measured:
        """A candidate with other pictures."""
        return self._measure(excluded, self.tables, request).measured

    def _measure(self, excluded: int, tables: Mapping[str, Quantize], request: Request) -> Point:
        share = self.order.share(excluded)
        label = f"{share:.1%} of the multiply-accumulates quantised"
        return Point(excluded, share, self.drawings.measure(self.build(excluded, tables), request, label))
