"""Charts of a tuning as inline SVG, in the manner of a check's: places are percentages, text stands outside."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from toolchain.check.charts import CURVE_PX, ROW_PX, decibels
from toolchain.check.markup import Html, element
from toolchain.tune.result import Point
from toolchain.tune.search import Unit

GRID_DB = 10.0
SHOWN_DB = 99.0
"""Where the PSNR of equal pictures is drawn."""
STYLE = """
rect.bar { fill: var(--mark); }
rect.left { fill: var(--bad); }
.curve.median { stroke-dasharray: 5 3; }
circle.chosen { fill: var(--good) !important; stroke: var(--good); }
circle.naive { fill: var(--bad) !important; stroke: var(--bad); }
@media (min-width: 44rem) { .bars .row { grid-template-columns: 27rem minmax(0, 1fr) 13rem; } }
.bars .row > :first-child { font-size: .8125rem; }
.curves .steps { font-size: .75rem; }
"""


def pareto(points: Sequence[Point], naive: Sequence[Point], chosen: Point) -> Html:
    """PSNR over the share that is quantised: a solid line for the least, a dashed one for the median."""
    every = [*points, *naive]
    values = [_db(p, name) for p in every for name in ("psnr_db", "median_psnr_db")]
    low, high = GRID_DB * math.floor(min(values) / GRID_DB), GRID_DB * math.ceil(max(values) / GRID_DB)
    left, right = min(p.share for p in every), max(p.share for p in every)

    def x(point: Point) -> str:
        return f"{100 * (point.share - left) / ((right - left) or 1):.2f}%"

    def y(value: float) -> str:
        return f"{100 - 100 * (value - low) / ((high - low) or 1):.2f}%"

    grid = [low + GRID_DB * i for i in range(round((high - low) / GRID_DB) + 1)]
    marks = [element("line", x1=0, x2="100%", y1=y(value), y2=y(value), class_="grid") for value in grid]
    ordered = sorted(points, key=lambda p: p.share)
    for name, kind in (("psnr_db", "curve"), ("median_psnr_db", "curve median")):
        for a, b in itertools.pairwise(ordered):
            marks.append(element("line", x1=x(a), x2=x(b), y1=y(_db(a, name)), y2=y(_db(b, name)), class_=kind))
        candidates = [(p, "chosen" if p is chosen else None) for p in points]
        # What was chosen comes last: it equals its naive one where the largest ranges and scales won.
        for point, kinds in [*((p, "naive") for p in naive), *sorted(candidates, key=lambda c: c[0] is chosen)]:
            title = element("title", f"{point.share:.1%} quantised, {name}: {decibels(point.measured.summary[name])}")
            marks.append(element("circle", title, cx=x(point), cy=y(_db(point, name)), r=4, class_=kinds))
    label = f"PSNR of {len(points)} candidates over the share quantised, from {left:.0%} to {right:.0%}"
    drawing = element("svg", *marks, height=CURVE_PX, role="img", aria_label=label)
    texts = [element("text", f"{v:g} dB", x="100%", y=y(v), dy="0.35em", text_anchor="end") for v in grid]
    axis = element("svg", *texts, class_="ticks", height=CURVE_PX, aria_hidden="true")
    ends = element("div", element("span", f"{left:.0%} quantised"), element("span", f"{right:.0%}"), class_="steps")
    return element("div", axis, drawing, ends, class_="curves")


def _db(point: Point, name: str) -> float:
    return min(point.measured.summary[name], SHOWN_DB)


def bars(units: Sequence[Unit], excluded: int, most: int) -> Html:
    """A bar for each of the first units: its share of the whole error; excluded ones have another colour."""
    total = sum(unit.error for unit in units) or 1.0
    macs = sum(unit.macs for unit in units) or 1
    longest = max((unit.error for unit in units), default=0.0) or 1.0
    rows = []
    for number, unit in enumerate(units[:most]):
        label = f"{unit.error / total:.2%}, of the work {unit.macs / macs:.2%}"
        kind = "bar left" if number < excluded else "bar"
        width = f"{100 * unit.error / longest:.2f}%"
        bar = element("rect", x=0, y="20%", width=width, height="60%", class_=kind)
        name = f"{unit.component} {unit.pattern}"
        drawing = element("svg", bar, height=ROW_PX, role="img", aria_label=f"{name}: {label}")
        rows.append(element("div", element("span", name), drawing, element("span", label), class_="row"))
    return element("div", *rows, class_="rows bars")
