"""A benchmark as a page: one HTML file that needs neither network nor scripts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from toolchain.bench.report import BenchReport, Result, alike, spread

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
  border-bottom: 1px solid var(--line); font-variant-numeric: tabular-nums; }
.wide { overflow-x: auto; } svg { width: 100%; height: auto; display: block; }
svg text { font: 13px system-ui, sans-serif; fill: currentColor; }
.key { display: inline-block; margin-right: 1rem; white-space: nowrap; }
.key i { display: inline-block; width: .8em; height: .8em; margin-right: .3em; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(report: BenchReport) -> str:
    """The whole document. Everything that a user wrote is escaped."""
    work = report.workload
    title = f"{report.recipe}: {work['batch']} picture(s) of {work['size']}, {work['steps']} steps"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f"<p>&ldquo;{escape(str(work['prompt']))}&rdquo;, {escape(str(work['scheduler']))}, guidance "
        f"{work['guidance']}; medians of {report.repeats} rounds in turn, the first picture of each process left "
        "out.</p>",
        _verdicts(report),
        "<h2>A call by stage</h2>",
        _bars({name: {k: s.median for k, s in r.stages.items()} for name, r in report.contenders.items()}),
        _table(report.contenders, int(work["batch"])),
        "<h2>Cold start: from the process to the first picture</h2>",
        _bars({name: r.start for name, r in report.contenders.items()}),
        *(_sweep(kind, points) for kind, points in report.sweeps.items()),
        "<h2>Machine</h2>",
        f"<pre>{escape(_plain(report.machine))}\n{escape(_plain(report.versions))}</pre>",
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(parts)}</body></html>\n'


def _verdicts(report: BenchReport) -> str:
    lines = []
    for name, values in report.ratios.items():
        found, likeness = spread(values), report.likeness_db[name]
        same = alike(likeness)
        lines.append(
            f"<li><b>{escape(name)}</b> takes <b>{found.median:.2f} times</b> as long "
            f"({found.p10:.2f} to {found.p90:.2f}); its picture and ours: {same}</li>"
        )
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _bars(rows: Mapping[str, Mapping[str, float]]) -> str:
    """Stacked bars on one scale, with the numbers written beside them."""
    longest = max(sum(row.values()) for row in rows.values()) or 1.0
    shapes, y = [], 0
    for name, row in rows.items():
        total = sum(row.values())
        shapes.append(f'<text x="0" y="{y + 16}">{escape(name)}: {total:.0f} ms</text>')
        x = 0.0
        for stage, ms in row.items():
            width = ms / longest * 800
            label = f"{_name(stage)} {ms:.1f} ms"
            colour = COLOURS.get(stage, "#888")
            shapes.append(
                f'<rect x="{x:.1f}" y="{y + 22}" width="{max(width, 0):.1f}" height="22" fill="{colour}">'
                f"<title>{escape(label)}</title></rect>"
            )
            x += width
        y += 60
    stages = dict.fromkeys(stage for row in rows.values() for stage in row)
    keys = "".join(
        f'<span class="key"><i style="background:{COLOURS.get(s, "#888")}"></i>{escape(_name(s))}</span>'
        for s in stages
    )
    return f'<svg viewBox="0 0 800 {y}" role="img">{"".join(shapes)}</svg><p>{keys}</p>'


def _table(contenders: Mapping[str, Result], images: int) -> str:
    stages = dict.fromkeys(stage for result in contenders.values() for stage in result.stages)
    head = "".join(f"<th>{escape(_name(stage))}</th>" for stage in stages)
    rows = []
    for name, result in contenders.items():
        cells = [_spread(result, stage) for stage in stages]
        memory = f"{result.peak_mb:.0f} MB" if result.peak_mb is not None else ""
        total, rate = result.total, images / result.total.median * 1e3
        cells += [f"{total.median:.1f} ({total.p10:.1f} to {total.p90:.1f})", f"{rate:.2f}", memory]
        rows.append(f"<tr><th>{escape(name)}</th>{''.join(f'<td>{c}</td>' for c in cells)}</tr>")
    head = f"<tr><th></th>{head}<th>total</th><th>images/s</th><th>peak memory</th></tr>"
    return f'<div class="wide"><table>{head}{"".join(rows)}</table></div><p>Milliseconds: median (p10 to p90).</p>'


def _spread(result: Result, stage: str) -> str:
    found = result.stages.get(stage)
    return f"{found.median:.1f} ({found.p10:.1f} to {found.p90:.1f})" if found else ""


def _sweep(kind: str, points: Sequence[Mapping[str, Any]]) -> str:
    """How cost grows: time over what was varied, from zero."""
    highest = max(point["total_ms"] for point in points)
    place = [
        (60 + i * 680 / max(len(points) - 1, 1), 200 - 170 * point["total_ms"] / highest)
        for i, point in enumerate(points)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in place)
    marks = "".join(
        f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="#2b6cb0"/>'
        f'<text x="{x:.1f}" y="{y - 10:.1f}" text-anchor="middle">{point["total_ms"]:.0f} ms</text>'
        f'<text x="{x:.1f}" y="222" text-anchor="middle">{escape(str(point[kind]))}</text>'
        for (x, y), point in zip(place, points, strict=True)
    )
    curve = f'<polyline points="{line}" fill="none" stroke="#2b6cb0" stroke-width="2"/>'
    axis = '<line x1="40" y1="200" x2="760" y2="200" stroke="currentColor" stroke-opacity=".3"/>'
    return f'<h2>Cost by {escape(kind)}</h2><svg viewBox="0 0 800 230" role="img">{axis}{curve}{marks}</svg>'


def _name(stage: str) -> str:
    return stage.removesuffix("_ms").replace("_", " ")


def _plain(values: Mapping[str, Any]) -> str:
    return "\n".join(f"{key}: {value}" for key, value in values.items())
