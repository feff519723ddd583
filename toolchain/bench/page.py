"""A benchmark as a page: one HTML file that needs neither network nor scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.bench.report import BenchReport, Result, Spread, alike, spread
from toolchain.markup import Html, element, join, table

COLOURS = {
    "process_ms": "#9aa5b1",
    "imports_ms": "#7b8794",
    "manifest_ms": "#b8c0c9",
    "verify_ms": "#c9a227",
    "open_and_warm_up_ms": "#2f855a",
    "load_ms": "#2f855a",
    "first_picture_ms": "#2b6cb0",
    "tokenize_ms": "#b8c0c9",
    "text_ms": "#c9a227",
    "denoise_ms": "#2b6cb0",
    "decode_ms": "#2f855a",
    "overhead_ms": "#c53030",
}
STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 16px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 60rem; padding: 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; width: 100%; } th, td { padding: .3rem .5rem; text-align: left;
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { overflow-x: auto; } svg { width: 100%; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(report: BenchReport) -> str:
    """The whole document. Everything that a user wrote is escaped."""
    work = report.workload
    title = f"{report.recipe}: {work['batch']} picture(s) of {work['size']}, {work['steps']} steps"
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width"),
        element("title", title),
        element("style", Html(STYLE)),
    )
    about = (
        f"“{work['prompt']}”, {work['scheduler']}, guidance {work['guidance']}; medians of {report.repeats} rounds in "
        "turn, the first picture of each process left out."
    )
    body = element(
        "body",
        element("h1", title),
        element("p", about),
        _verdicts(report),
        element("h2", "A call by stage"),
        _bars({name: {k: s.median for k, s in r.stages.items()} for name, r in report.contenders.items()}),
        _stages(report.contenders, int(work["batch"])),
        *([element("p", f"Memory: {report.memory}.")] if report.memory else []),
        element("h2", "Cold start: from the process to the first picture"),
        _bars({name: r.start for name, r in report.contenders.items()}),
        *(_sweep(kind, points) for kind, points in report.sweeps.items()),
        element("h2", "Machine"),
        element("pre", f"{_plain(report.machine)}\n{_plain(report.versions)}"),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _verdicts(report: BenchReport) -> Html:
    lines = []
    for name, values in report.ratios.items():
        found, same = spread(values), alike(report.likeness_db[name])
        times = element("b", f"{found.median:.2f} times")
        between = f" as long ({found.p10:.2f} to {found.p90:.2f}); its picture and ours: {same}"
        lines.append(element("li", element("b", name), " takes ", times, between))
    return element("ul", *lines) if lines else Html()


def _bars(rows: Mapping[str, Mapping[str, float]]) -> Html:
    """Stacked bars on one scale, with the numbers written beside them."""
    longest = max(sum(row.values()) for row in rows.values()) or 1.0
    shapes, y = [], 0
    for name, row in rows.items():
        shapes.append(element("text", f"{name}: {sum(row.values()):.0f} ms", x=0, y=y + 16))
        x = 0.0
        for stage, ms in row.items():
            width = max(ms / longest * 800, 0)
            label = element("title", f"{_name(stage)} {ms:.1f} ms")
            shapes.append(
                element("rect", label, x=f"{x:.1f}", y=y + 22, width=f"{width:.1f}", height=22, fill=_colour(stage))
            )
            x += width
        y += 60
    stages = dict.fromkeys(stage for row in rows.values() for stage in row)
    keys = [element("span", element("i", style=f"background:{_colour(s)}"), _name(s), class_="key") for s in stages]
    return join(element("svg", *shapes, viewBox=f"0 0 800 {y}", role="img"), element("p", *keys))


def _colour(stage: str) -> str:
    return COLOURS.get(stage, "#888")


def _stages(contenders: Mapping[str, Result], images: int) -> Html:
    stages = dict.fromkeys(stage for result in contenders.values() for stage in result.stages)
    rows = []
    for name, result in contenders.items():
        times = [_spread(result.stages.get(stage)) for stage in stages]
        memory = [f"{mb:.0f} MB" if mb is not None else "" for mb in (result.peak_mb, result.gpu_mb)]
        rate = images / result.total.median * 1e3
        rows.append([name, *times, _spread(result.total), f"{rate:.2f}", *memory])
    head = ["", *map(_name, stages), "total", "images/s", "peak memory", "on the GPU"]
    return join(table(head, rows), element("p", "Milliseconds: median (p10 to p90)."))


def _spread(found: Spread | None) -> str:
    return f"{found.median:.1f} ({found.p10:.1f} to {found.p90:.1f})" if found else ""


def _sweep(kind: str, points: Sequence[Mapping[str, Any]]) -> Html:
    """How cost grows: time over what was varied, from zero."""
    highest = max(point["total_ms"] for point in points)
    place = [
        (60 + i * 680 / max(len(points) - 1, 1), 200 - 170 * point["total_ms"] / highest)
        for i, point in enumerate(points)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    axis = element("line", x1=40, y1=200, x2=760, y2=200, stroke="currentColor", stroke_opacity=".3")
    shapes = [axis, element("polyline", points=line, fill="none", stroke="#2b6cb0", stroke_width=2)]
    for (x, y), point in zip(place, points, strict=True):
        left = f"{x:.1f}"
        shapes += [
            element("circle", cx=left, cy=f"{y:.1f}", r=4, fill="#2b6cb0"),
            element("text", f"{point['total_ms']:.0f} ms", x=left, y=f"{y - 10:.1f}", text_anchor="middle"),
            element("text", str(point[kind]), x=left, y=222, text_anchor="middle"),
        ]
    return join(element("h2", f"Cost by {kind}"), element("svg", *shapes, viewBox="0 0 800 230", role="img"))


def _name(stage: str) -> str:
    return stage.removesuffix("_ms").replace("_", " ")


def _plain(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())
