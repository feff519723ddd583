"""The search: which units are quantised, from measured errors to the largest share that keeps a budget. Pure.

Units are excluded in one order, the one with most error for its multiply-accumulates first. So a candidate is a number:
how many of them are excluded.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

LEAST_SHARE = 0.5
"""Of the multiply-accumulates: with less in the smaller type, it is hardly worth its name."""
SHARES = (1.0, 0.95, 0.9, 0.8, 0.7, 0.6, LEAST_SHARE)
"""Of the points of the curve, as near as whole units come to them."""


@dataclass(frozen=True)
class Unit:
    """What is quantised or excluded as one: a layer, or the layers of a block.

    component  whose
    pattern    the entry of `quantize.exclude` that leaves it as it is
    macs       multiply-accumulates of one picture
    elements   of its weights
    error      what quantising it alone does to a picture: mean squared error of levels of 255, as predicted
    """

    component: str
    pattern: str
    macs: int
    elements: int
    error: float

    @property
    def price(self) -> float:
        """Error for a multiply-accumulate."""
        return self.error / max(self.macs, 1)


def ordered(units: Iterable[Unit]) -> list[Unit]:
    """The order in which units are excluded; names decide between equals, so that it is the same every time."""
    return sorted(units, key=lambda u: (-u.price, u.component, u.pattern))


@dataclass(frozen=True)
class Order:
    """Units in the order of their exclusion.

    fixed  multiply-accumulates of a picture that are never quantised, whatever is searched
    """

    units: Sequence[Unit]
    fixed: int

    def share(self, excluded: int) -> float:
        """Of all multiply-accumulates of a picture, those in the smaller type with the first `excluded` units left."""
        return sum(u.macs for u in self.units[excluded:]) / (sum(u.macs for u in self.units) + self.fixed)

    def error(self, excluded: int) -> float:
        """What the units that are left predict together: errors of different layers add up."""
        return sum(u.error for u in self.units[excluded:])

    def nearest(self, share: float) -> int:
        """How many to exclude for the share that comes nearest."""
        return min(range(len(self.units) + 1), key=lambda n: abs(self.share(n) - share))

    @property
    def most_excluded(self) -> int:
        """The largest candidate whose share is LEAST_SHARE or more of what could be quantised."""
        whole = self.share(0)
        return max(n for n in range(len(self.units) + 1) if self.share(n) >= LEAST_SHARE * whole)

    def points(self) -> list[int]:
        """The candidates of the curve."""
        whole, last = self.share(0), self.most_excluded
        return sorted({min(self.nearest(share * whole), last) for share in SHARES})


def largest_passing(points: Sequence[int], passes: Callable[[int], bool]) -> int | None:
    """The smallest number of excluded units that passes, between the points of a curve, all of which are measured.

    Bisects between the first point that passes and the one before it. None where no point passes.
    """
    results = {point: passes(point) for point in points}
    first = next((point for point in points if results[point]), None)
    if first is None:
        return None
    failing = max((point for point in points if point < first), default=first - 1)
    passing = first
    while passing - failing > 1 and first != points[0]:
        middle = (failing + passing) // 2
        if passes(middle):
            passing = middle
        else:
            failing = middle
    return passing
