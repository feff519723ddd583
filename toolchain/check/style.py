"""How the page of a check looks: system fonts, two colour schemes, one column on a phone."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --ground: #fff; --text: #1d1f23; --faint: #646b76; --line: #dfe2e7; --panel: #f5f6f8;
  --mark: #2f6db5; --good: #1c7a43; --bad: #c0302b; --limit: #9a6a00;
}
@media (prefers-color-scheme: dark) {
  :root {
    --ground: #15171a; --text: #e5e7ea; --faint: #9aa1ac; --line: #32363d; --panel: #1e2125;
    --mark: #6ea8e8; --good: #5cc489; --bad: #ff7b72; --limit: #d9a441;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 64rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--text);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; overflow-wrap: anywhere;
}
h1 { font-size: 1.25rem; margin: 0 0 1rem; }
h2 { font-size: 1.05rem; margin: 2.5rem 0 .5rem; }
h3 { font-size: 1rem; font-weight: 600; margin: 0; }
p { margin: .25rem 0; }
ul { margin: .5rem 0 0; padding-left: 1.2rem; }
.note, figcaption { color: var(--faint); font-size: .875rem; }
.good { color: var(--good); }
.bad { color: var(--bad); }
.verdict { border-left: .3rem solid; background: var(--panel); padding: .75rem 1rem; border-radius: .25rem; }
.verdict strong { font-size: 1.3rem; }
.verdict > * { margin: 0; }
.verdict .note, .verdict ul { color: var(--text); font-size: .925rem; }
.warning { border-left: .3rem solid var(--limit); padding: .25rem 1rem; margin: 1rem 0; }

.pictures { display: grid; gap: 0 2rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 28rem), 1fr)); }
.picture { border-top: 1px solid var(--line); padding: .9rem 0; }
.picture.large { grid-column: 1 / -1; }
.picture.failed { border-left: .3rem solid var(--bad); padding-left: .75rem; }
.three { display: grid; grid-template-columns: repeat(3, minmax(0, 1fr)); gap: .5rem; margin-top: .5rem; }
figure { margin: 0; }
figcaption { line-height: 1.3; margin-top: .25rem; }
img { display: block; width: 100%; height: auto; outline: 1px solid var(--line); }
img.small { image-rendering: pixelated; }
.zoom { display: block; position: relative; cursor: zoom-in; }
.zoom input { position: absolute; opacity: 0; pointer-events: none; }
.zoom input:focus-visible + img { outline: 3px solid var(--mark); }
.zoom input:checked + img {
  position: fixed; inset: 0; z-index: 1; width: 100vw; height: 100vh; object-fit: contain; background: var(--ground);
  cursor: zoom-out;
}

svg { display: block; width: 100%; overflow: visible; }
.rows { margin-top: .75rem; }
.row { display: grid; gap: 0 1rem; padding: .3rem 0; align-items: center; }
.row > :last-child { font-size: .875rem; font-variant-numeric: tabular-nums; }
.axis > :last-child { color: var(--faint); }
@media (min-width: 44rem) { .row { grid-template-columns: 13rem minmax(0, 1fr) 15rem; padding: .1rem 0; } }
@media (max-width: 43.99rem) { .row { padding: .45rem .4rem; } .axis > :first-child { display: none; } }
circle { fill: var(--ground); stroke: var(--mark); stroke-width: 1.5; }
circle.worst, .curves circle { fill: var(--mark); }
circle.bad { stroke: var(--bad); }
circle.worst.bad, .curves circle.bad { fill: var(--bad); }
line { stroke-width: 1; }
.grid { stroke: var(--line); }
.span, .curve { stroke: var(--mark); stroke-width: 1.5; }
.span { opacity: .45; }
.limit { stroke: var(--limit); stroke-width: 2; stroke-dasharray: 4 3; }
.ticks text { fill: var(--faint); font-size: .75rem; }
.charts { display: grid; gap: 1.5rem 2.5rem; grid-template-columns: repeat(auto-fit, minmax(min(100%, 24rem), 1fr)); }
.charts { margin-top: .75rem; }
.curves { display: grid; grid-template-columns: 3.6rem minmax(0, 1fr); gap: .25rem .75rem; margin: .75rem .4rem 0 0; }
.curves .note { grid-column: 1 / -1; }
.steps { grid-column: 2; display: flex; justify-content: space-between; color: var(--faint); font-size: .75rem; }
.key { display: inline-block; width: 1.5rem; border-top: 2px dashed var(--limit); vertical-align: middle; }

.scroll { overflow-x: auto; margin-top: .5rem; }
table { border-collapse: collapse; font-size: .875rem; min-width: 100%; }
th, td { text-align: left; padding: .25rem .75rem .25rem 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { font-weight: 600; }
.number { text-align: right; font-variant-numeric: tabular-nums; }
code, pre { font: .8125rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { white-space: pre-wrap; background: var(--panel); padding: .75rem 1rem; border-radius: .25rem; margin: .5rem 0; }
details { border-top: 1px solid var(--line); padding: .6rem 0; }
details:last-of-type { border-bottom: 1px solid var(--line); }
summary { cursor: pointer; font-weight: 600; }
dl { display: grid; grid-template-columns: 7rem minmax(0, 1fr); gap: .25rem 1rem; margin: .5rem 0; }
dt { color: var(--faint); }
dd { margin: 0; }
"""
