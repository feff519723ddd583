"""A benchmark as a page: one HTML file that needs neither network nor scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from toolchain.bench.results import BenchReport, ContenderResult, Spread, alike, spread
from toolchain.check.markup import Html, element, join, table
from toolchain.check.page import figure, page_head
from toolchain.check.style import STYLE

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
    "total_ms": "#2b6cb0",
    "engines": "#2b6cb0",
    "on the GPU": "#2f855a",
}
BARS = """
.bar { display: flex; height: 1.4rem; margin: .1rem 0 .6rem; }
.bar i { display: block; min-width: 0; }
.keys { font-size: .875rem; }
.keys span { display: inline-block; margin-right: 1rem; }
.keys i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
.pictures { grid-template-columns: repeat(auto-fill, minmax(min(100%, 9rem), 1fr)); gap: .75rem; }
table { overflow-wrap: normal; }
th, td { white-space: normal; vertical-align: top; font-variant-numeric: tabular-nums; }
td span { color: var(--faint); }
td span, td:first-child { white-space: nowrap; }
@media (max-width: 43.99rem) {
  td span { display: block; font-size: .6875rem; white-space: normal; }
  th, td { padding-right: .4rem; font-size: .75rem; }
}
"""


def page(report: BenchReport) -> str:
    """The whole document. Everything that a user wrote is escaped."""
    work = report.workload
    title = f"{report.recipe}: {work['batch']} picture(s) of {work['size']}, {work['steps']} steps"
    head = page_head(title, STYLE + BARS)
    about = (
        f"“{work['prompt']}”, {work['scheduler']}, guidance {work['guidance']}; medians of {report.repeats} rounds in "
        "turn, the first picture of each process left out."
    )
    body = element(
        "body",
        element("h1", title),
        element("p", about),
        _verdicts(report),
        _pictures(report),
        element("h2", "A call by stage"),
        _bars({name: {k: s.median for k, s in r.stages.items()} for name, r in report.contenders.items()}, "ms"),
        _stages(report.contenders, int(work["batch"])),
        _memory(report),
        element("h2", "Cold start: from the process to the first picture"),
        _bars({name: r.start for name, r in report.contenders.items()}, "ms"),
        *(_sweep(kind, points) for kind, points in report.sweeps.items()),
        element("h2", "Machine"),
        element("pre", f"{_plain(report.machine)}\n{_plain(report.versions)}"),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _verdicts(report: BenchReport) -> Html:
    lines = []
    for name, values in report.ratios.items():
        ratio, same = spread(values), alike(report.likeness_db[name])
        times = element("b", f"{ratio.median:.2f} times")
        between = f" as long ({ratio.p10:.2f} to {ratio.p90:.2f}); its picture and ours: {same}"
        between += f"; it computes in {report.precisions[name]}" if name in report.precisions else ""
        lines.append(element("li", element("b", name), " takes ", times, between))
    return element("ul", *lines) if lines else Html()


def _pictures(report: BenchReport) -> Html:
    """The first of each contender: that of another prompt or of noise alone is seen, whatever it took."""
    if not report.pictures:
        return Html()
    figures = [figure(pixels, name) for name, pixels in report.pictures.items()]
    note = element("p", "The first picture of each. A click enlarges it.", class_="note")
    return join(element("h2", "Pictures"), note, element("div", *figures, class_="pictures"))


def _bars(rows: Mapping[str, Mapping[str, float]], unit: str) -> Html:
    """Stacked bars on one scale under their names and sums; text is the page's own, and keeps its size on a phone."""
    longest = max(sum(row.values()) for row in rows.values()) or 1.0
    drawn = []
    for name, row in rows.items():
        parts = [
            element("i", title=f"{_name(part)} {value:.1f} {unit}", style=_block(part, max(value / longest * 100, 0)))
            for part, value in row.items()
        ]
        drawn += [element("div", f"{name}: {sum(row.values()):.0f} {unit}"), element("div", *parts, class_="bar")]
    parts_of_all = dict.fromkeys(part for row in rows.values() for part in row)
    keys = [element("span", element("i", style=_block(part)), _name(part)) for part in parts_of_all]
    return element("div", *drawn, *([element("p", *keys, class_="keys")] if len(keys) > 1 else []), class_="bars")


def _block(part: str, percent: float | None = None) -> str:
    width = "" if percent is None else f";width:{percent:.2f}%"
    return f"background:{COLOURS.get(part, '#888')}{width}"


def _stages(contenders: Mapping[str, ContenderResult], images: int) -> Html:
    """A column for each contender, which are few, and a row for each stage."""
    results = list(contenders.values())
    stages = dict.fromkeys(stage for result in results for stage in result.stages)
    rows: list[list[str]] = [[_name(stage), *(_spread(r.stages.get(stage)) for r in results)] for stage in stages]
    rows.append(["total", *(_spread(r.total) for r in results)])
    rows.append(["images/s", *(f"{images / r.total.median * 1e3:.2f}" for r in results)])
    note = element("p", "Milliseconds: median (tenth to ninetieth percentile).", class_="note")
    return join(table(["", *contenders], rows), note)


def _spread(value: Spread | None) -> Html:
    if value is None:
        return Html()
    digits = 0 if value.median >= 100 else 1
    spread_ = f"({value.p10:.{digits}f} to {value.p90:.{digits}f})"
    return join(f"{value.median:.{digits}f} ", element("span", spread_))


def _memory(report: BenchReport) -> Html:
    """Peak of each process, of which ours also knows what came with the engines, and what lies on the GPU."""
    rows: dict[str, dict[str, float]] = {}
    for name, result in report.contenders.items():
        if result.peak_mb is not None:
            engines = result.grown_mb or 0.0
            rows[name] = {"process": result.peak_mb - engines, **({"engines": engines} if engines else {})}
        if result.gpu_mb is not None:
            rows[f"{name} on the GPU"] = {"on the GPU": result.gpu_mb}
    said = [element("p", f"Memory: {report.memory}.")] if report.memory else []
    if not rows:
        return join(*said)
    note = element("p", "Resident memory at its peak, mapped weight files included.", class_="note")
    return join(element("h2", "Memory"), _bars(rows, "MB"), note, *said)


def _sweep(kind: str, points: Sequence[Mapping[str, Any]]) -> Html:
    """How cost grows with what was varied."""
    rows = {f"{kind} {point[kind]}": {"total_ms": point["total_ms"]} for point in points}
    return join(element("h2", f"Cost by {kind}"), _bars(rows, "ms"))


def _name(stage: str) -> str:
    return stage.removesuffix("_ms").replace("_", " ")


def _plain(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())
