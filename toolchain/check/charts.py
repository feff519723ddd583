"""Charts of signal-to-noise ratios as inline SVG.

Places are percentages and text stands outside the drawing, so that a chart is as wide as its page and text keeps its
size on a phone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from toolchain.check.markup import Html, element
from toolchain.check.report import Entry

ROW_PX = 20
CURVE_PX = 150
GRID_DB = 20.0


@dataclass(frozen=True)
class Scale:
    """Decibels between multiples of GRID_DB as a percentage of a length."""

    low: float
    high: float

    @classmethod
    def of(cls, entries: Sequence[Entry]) -> Scale:
        """From 0, or below where a ratio is negative, to above the largest ratio and limit."""
        values = [v for e in entries for v in (_snr(e), _limit(e)) if math.isfinite(v)]
        low = GRID_DB * math.floor(min(0.0, *values, 0.0) / GRID_DB)
        return cls(low, GRID_DB * (math.floor(max(0.0, *values, 0.0) / GRID_DB) + 1))

    def percent(self, value: float) -> float:
        """Infinities and NaN lie at the ends: nothing differs, or nothing is right."""
        if not math.isfinite(value):
            return 100.0 if value > 0 else 0.0
        return 100 * (value - self.low) / (self.high - self.low)

    @property
    def grid(self) -> list[float]:
        """Decibels of the grid lines, at most nine."""
        step = GRID_DB * math.ceil((self.high - self.low) / GRID_DB / 8)
        count = int((self.high - self.low) / step) + 1
        return [self.low + step * i for i in range(count)]


def decibels(value: float | None) -> str:
    """A ratio as people read it; infinite where nothing differs."""
    if value is None or math.isnan(value):
        return "NaN"
    return f"{value:.1f} dB" if math.isfinite(value) else f"{'-' if value < 0 else ''}∞ dB"


def at_least(limit: float) -> str:
    """A lower limit in words."""
    return f"at least {limit:g} dB"


def component_chart(groups: Mapping[str, Sequence[Entry]]) -> Html:
    """A row for each group: a dot for every comparison, the worst one filled, the limit as a line."""
    scale = Scale.of([e for entries in groups.values() for e in entries])
    rows = [_row(name, entries, scale) for name, entries in groups.items()]
    ticks = [
        element("text", f"{value:g}", x=_x(scale, value), y=12, text_anchor=_anchor(scale.percent(value)))
        for value in scale.grid
    ]
    axis = element("svg", *ticks, class_="ticks", height=16, aria_hidden="true")
    return element(
        "div", *rows, element("div", element("span"), axis, element("span", "dB"), class_="row axis"), class_="rows"
    )


def _row(name: str, entries: Sequence[Entry], scale: Scale) -> Html:
    lowest = min(entries, key=_snr)
    failed = any("snr_db" in e.failed or "finite" in e.failed for e in entries)
    label = f"{decibels(lowest.metrics.snr_db)} ({at_least(_limit(lowest))})" + (", FAILED" if failed else "")
    marks = [_grid_line(scale, value) for value in scale.grid]
    left, right = _snr(lowest), max(map(_snr, entries))
    marks.append(element("line", x1=_x(scale, left), x2=_x(scale, right), y1="50%", y2="50%", class_="span"))
    for limit in sorted({_limit(e) for e in entries}):
        marks.append(element("line", x1=_x(scale, limit), x2=_x(scale, limit), y1=0, y2="100%", class_="limit"))
    for entry in sorted(entries, key=lambda e: e is lowest):
        kind = " ".join([*(["bad"] if not _kept(entry) else []), *(["worst"] if entry is lowest else [])])
        title = element("title", _title(entry))
        marks.append(element("circle", title, cx=_x(scale, _snr(entry)), cy="50%", r=4, class_=kind or None))
    drawing = element("svg", *marks, height=ROW_PX, role="img", aria_label=f"{name}: {label}")
    number = element("span", label, class_="bad" if failed else None)
    return element("div", element("span", name), drawing, number, class_="row")


def curve_chart(lines: Mapping[str, Sequence[Entry]]) -> Html:
    """A curve for each trajectory over the evaluations of the denoiser, and the limit as a line."""
    entries = [e for line in lines.values() for e in line]
    scale = Scale.of(entries)
    last = max(e.evaluation or 1 for e in entries)

    def place(entry: Entry) -> tuple[str, str]:
        x = 100 * ((entry.evaluation or 1) - 1) / max(last - 1, 1)
        return f"{x:.2f}%", _y(scale, _snr(entry))

    marks = []
    for value in scale.grid:
        y = _y(scale, value)
        marks.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="grid"))
    for limit in sorted({_limit(e) for e in entries}):
        y = _y(scale, limit)
        marks.append(element("line", x1=0, x2="100%", y1=y, y2=y, class_="limit"))
    for line in lines.values():
        ordered = sorted(line, key=lambda e: e.evaluation or 1)
        for (x1, y1), (x2, y2) in zip(map(place, ordered), map(place, ordered[1:]), strict=False):
            marks.append(element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_="curve"))
    for entry in sorted(entries, key=_snr, reverse=True):
        x, y = place(entry)
        title = element("title", _title(entry))
        marks.append(element("circle", title, cx=x, cy=y, r=4, class_=None if _kept(entry) else "bad"))
    labels = [
        element("text", f"{value:g} dB", x="100%", y=_y(scale, value), dy="0.35em", text_anchor="end")
        for value in scale.grid
    ]
    lowest = min(entries, key=_snr)
    label = f"lowest {decibels(lowest.metrics.snr_db)}, {lowest.input}; {at_least(_limit(lowest))}"
    drawing = element("svg", *marks, height=CURVE_PX, role="img", aria_label=label)
    axis = element("svg", *labels, class_="ticks", height=CURVE_PX, aria_hidden="true")
    steps = element("div", element("span", "evaluation 1"), element("span", str(last)), class_="steps")
    return element("div", axis, drawing, steps, element("p", label, class_="note"), class_="curves")


def _grid_line(scale: Scale, value: float) -> Html:
    return element("line", x1=_x(scale, value), x2=_x(scale, value), y1=0, y2="100%", class_="grid")


def _title(entry: Entry) -> str:
    return f"{entry.input}, {entry.output}: {decibels(entry.metrics.snr_db)}"


def _kept(entry: Entry) -> bool:
    return not {"snr_db", "finite"} & {*entry.failed}


def _snr(entry: Entry) -> float:
    """NaN counts as nothing left of the signal: it would have no place in an order."""
    value = entry.metrics.snr_db
    assert value is not None
    return -math.inf if math.isnan(value) else value


def _limit(entry: Entry) -> float:
    assert entry.limits.snr_db is not None
    return entry.limits.snr_db


def _x(scale: Scale, value: float) -> str:
    return f"{scale.percent(value):.2f}%"


def _y(scale: Scale, value: float) -> str:
    return f"{100 - scale.percent(value):.2f}%"


def _anchor(percent: float) -> str:
    """So that the numbers at the ends stay inside the drawing."""
    return "start" if percent < 1 else "end" if percent > 99 else "middle"
