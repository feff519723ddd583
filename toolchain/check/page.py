"""A check as a page: one HTML file that needs no network and no scripts."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolchain.bundle.bundle import ANY, Bundle
from toolchain.check.charts import at_least, component_chart, curve_chart, decibels
from toolchain.check.markup import Html, element, join, table
from toolchain.check.report import AT_MOST, CheckReport, Entry, Pair, Picture, show, worst
from toolchain.check.style import STYLE
from toolchain.recipe.toml import toml
from toolchain.store.files import write_atomic

if TYPE_CHECKING:
    from toolchain.check.report import Pixels

AMPLIFIED = 16
"""Times the difference of two pictures is shown: one level, which is what rounding does, can be seen on black."""
SHOWN_PIXELS = 6_000_000
"""Of all pictures together: five of SDXL, twenty-two of SD 1.5. It keeps the page below some 30 MB."""
SMALL = 256
"""Pictures below this many pixels a side are enlarged with hard edges: what a pixel is stays visible."""
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Nothing is loaded and nothing runs, whatever a prompt may hold: the browser's own guarantee beside the escaping."""
FLAWS = {"finite": "latents are not finite", "not blank": "blank"}
"""Gates of a picture that are no number, and what it means that one failed."""
METRICS = {"cosine": "cosine", "snr_db": "SNR dB", "max_error": "max error", "difference": "difference"}


def save_page(path: Path, report: CheckReport, bundle: Bundle) -> None:
    """Writes the page of a check of `bundle`, whole or not at all. StoreError when it cannot be written."""
    write_atomic(path, render(report, bundle).encode())


def page_head(title: str, style: str) -> Html:
    """The head of a page that loads and runs nothing."""
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("link", rel="icon", href="data:,"),
        element("title", title),
        element("style", Html(style)),
    )


def render(report: CheckReport, bundle: Bundle) -> str:
    """The whole document."""
    title = f"diffbuild check: {report.recipe}"
    head = page_head(f"{'passed' if report.passed else 'FAILED'}: {title}", STYLE)
    body = element(
        "body",
        element("h1", title),
        _verdict(report),
        *(element("p", f"Warning: {warning}", class_="warning") for warning in report.warnings),
        _pictures(report),
        _components(report),
        _curves(report),
        element("h2", "Details"),
        _comparisons(report),
        _recipe(bundle),
        _environment(report, bundle),
        _files(bundle),
    )
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _verdict(report: CheckReport) -> Html:
    failures = report.failures()
    gates = len(report.entries) + len(report.pictures)
    word = element("strong", "Failed" if failures else "Passed", class_="bad" if failures else "good")
    count = f"{len(failures)} of {gates} gates missed" if failures else f"all {gates} gates kept"
    at = f" at {report.revision}" if report.revision else ""
    lines = [
        element("p", word, f" {count}"),
        element("p", f"{report.bundle} ({report.backend}) against {report.model}{at}", class_="note"),
        *_extremes(report),
        *([element("ul", *(element("li", text) for text in _missed(report)))] if failures else []),
    ]
    return element("section", *lines, class_=f"verdict {'bad' if failures else 'good'}")


def _missed(report: CheckReport) -> list[str]:
    """A line for every output of which something failed, with its worst input, and one for the pictures."""
    lines = []
    for (component, bucket, output), group in report.grouped().items():
        failed = [e for e in group if not e.passed]
        if failed:
            count = f"{len(failed)} of {len(group)} missed" if len(group) > 1 else "missed"
            lines.append(f"{component} {bucket}, {output}: {count}; {failed[0].input}: {failed[0].numbers()}")
    pictures = [p for p in report.worst_pictures_first() if not p.passed]
    if pictures:
        lines.append(f"pictures: {len(pictures)} of {len(report.pictures)} missed, see below")
    return lines


def _extremes(report: CheckReport) -> list[Html]:
    """What came nearest to its limit, or furthest beyond."""
    lines = []
    if report.pictures:
        psnr, ssim = (_least(getattr(p, name) for p in report.pictures) for name in ("psnr_db", "ssim"))
        psnr_need, ssim_need = at_least(report.limits["psnr_db"]), f"at least {show(report.limits['ssim'])}"
        lowest_psnr = f"lowest PSNR {decibels(psnr)} ({psnr_need})"
        lines.append(f"Pictures, {len(report.pictures)}: {lowest_psnr}, lowest SSIM {_number(ssim)} ({ssim_need})")
    ratios = [e for e in report.entries if e.metrics.snr_db is not None]
    if ratios:
        lowest = min(ratios, key=_margin)
        lines.append(
            f"Outputs of components, {len(report.entries)}: lowest SNR against its limit "
            f"{decibels(lowest.metrics.snr_db)} ({at_least(lowest.limits.snr_db or 0.0)}), {lowest.component} "
            f"{lowest.bucket}, {lowest.input}"
        )
    return [element("p", line, class_="note") for line in lines]


def _margin(entry: Entry) -> float:
    snr, limit = entry.metrics.snr_db, entry.limits.snr_db
    assert snr is not None
    assert limit is not None
    return -math.inf if math.isnan(snr) else snr - limit


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pictures(report: CheckReport) -> Html:
    """The worst first, as many as keep the page of a sensible size; the others are named with their numbers."""
    figures: list[Html] = []
    left_out: list[Picture] = []
    pixels = 0
    for picture in report.worst_pictures_first():
        pixels += 0 if picture.pixels is None else picture.pixels.reference[..., 0].size
        if pixels > SHOWN_PIXELS and figures:
            left_out.append(picture)
        else:
            figures.append(_picture(picture, report.limits))
    rows = [[p.prompt, str(p.seed), p.size, decibels(p.psnr_db), _number(p.ssim), _word(p.passed)] for p in left_out]
    head = ["prompt", "seed", "size", "PSNR", "SSIM", ""]
    cut = f"Not shown, to keep this page small, are {len(rows)} that are better than these:"
    rest = [element("p", cut), table(head, rows, numbers=(1, 3, 4))] if rows else []
    note = (
        f"The worst first. The difference is absolute, the largest of the three channels, times {AMPLIFIED}: black is "
        f"equal, white is {math.ceil(255 / AMPLIFIED)} of 255 levels or more. A click enlarges a picture."
    )
    intro = [element("h2", "Pictures"), element("p", note, class_="note")]
    return join(*intro, element("div", *figures, class_="pictures"), *rest) if figures else Html()


def _picture(picture: Picture, limits: Mapping[str, float]) -> Html:
    numbers = [
        ("psnr_db", f"PSNR {decibels(picture.psnr_db)} ({at_least(limits['psnr_db'])})"),
        ("ssim", f"SSIM {_number(picture.ssim)} (at least {show(limits['ssim'])})"),
        *((name, text) for name, text in FLAWS.items() if name in picture.failed),
    ]
    about = [element("span", text, class_="bad" if name in picture.failed else None) for name, text in numbers]
    spaced = [part for text in about for part in (text, ", ")]
    pair = picture.pixels
    kinds = {"picture": True, "failed": not picture.passed, "large": pair and max(pair.reference.shape) > SMALL}
    return element(
        "article",
        element("h3", picture.prompt),
        element("p", f"{picture.size}, seed {picture.seed}: ", *spaced, _badge(picture.passed)),
        *([] if pair is None else _figures(pair, picture)),
        class_=" ".join(name for name, holds in kinds.items() if holds),
    )


def _figures(pair: Pair, picture: Picture) -> list[Html]:
    import numpy as np

    levels = np.abs(pair.reference.astype(np.int16) - pair.compiled).max(axis=-1)
    amplified = np.minimum(AMPLIFIED * levels, 255).astype(np.uint8)
    differ = f"{(levels > 0).mean():.1%} of the pixels differ, by {levels.max()} of 255 levels at most."
    figures = [
        figure(pair.reference, "reference"),
        figure(pair.compiled, "compiled"),
        figure(amplified, f"difference x{AMPLIFIED}"),
    ]
    summary = differ if levels.any() else "Every pixel is the same."
    summary += "" if picture.flip is None else f" FLIP {show(picture.flip)}."
    if picture.clip is not None:
        summary += f" CLIP score {show(picture.clip[1])}, the reference's {show(picture.clip[0])}."
    return [element("p", summary, class_="note"), element("div", *figures, class_="three")]


def figure(pixels: Pixels, caption: str) -> Html:
    """A picture that fills the window when it is clicked on, and goes back when it is clicked on again.

    The click ticks a box that nobody sees, which the style sheet goes by: no script runs.
    """
    from PIL import Image

    data = io.BytesIO()
    Image.fromarray(pixels).save(data, "PNG")
    height, width = pixels.shape[:2]
    source = f"data:image/png;base64,{base64.b64encode(data.getvalue()).decode()}"
    small = "small" if max(height, width) <= SMALL else None
    image = element("img", src=source, alt=caption, width=width, height=height, class_=small)
    box = element("input", type="checkbox", aria_label=f"enlarge: {caption}")
    return element("figure", element("label", box, image, class_="zoom"), element("figcaption", caption))


# --- components -------------------------------------------------------------------------------------------------------


def _components(report: CheckReport) -> Html:
    charted: dict[str, list[Entry]] = {}
    for entry in report.entries:
        if entry.metrics.snr_db is not None:
            name = entry.component if entry.bucket == ANY else f"{entry.component} {entry.bucket}"
            charted.setdefault(name, []).append(entry)
    rows = []
    for (component, bucket, output), group in report.grouped().items():
        measured, limits = worst(group), group[0].limits.named()
        cells = [_measured(measured, limits, name) for name in METRICS]
        passed = all(entry.passed for entry in group)
        rows.append([component, bucket, output, str(len(group)), *cells, _badge(passed)])
    note = join(
        "Power of the reference over power of the difference, higher is better. A dot is one output on one input, the "
        "filled one is the worst; ",
        element("span", class_="key"),
        " is the limit.",
    )
    chart = [element("p", note, class_="note"), component_chart(charted)] if charted else []
    head = ["component", "bucket", "output", "inputs", *METRICS.values(), ""]
    worsts = element("details", element("summary", "Worst of each output, with its limit"), table(head, rows))
    return join(element("h2", "Error by component"), *chart, worsts) if rows else Html()


def _curves(report: CheckReport) -> Html:
    """A chart for each bucket of the denoiser; a curve for each trajectory."""
    buckets: dict[str, dict[str, list[Entry]]] = {}
    for entry in report.entries:
        if entry.evaluation is not None and entry.metrics.snr_db is not None:
            trajectory = f"{entry.input.rpartition(', ')[0]}, {entry.output}"
            buckets.setdefault(f"{entry.component} {entry.bucket}", {}).setdefault(trajectory, []).append(entry)
    if not buckets:
        return Html()
    steps = report.by_evaluation()
    charts = [
        element("section", element("h3", name), curve_chart(lines), _steps(steps.get(name, {})))
        for name, lines in buckets.items()
    ]
    note = (
        "Signal-to-noise ratio of the denoiser's step along the reference's trajectories, a curve for each. Every "
        "evaluation gets the reference's inputs: errors do not add up here, but they do in the pictures."
    )
    intro = [element("h2", "Error by step"), element("p", note, class_="note")]
    return join(*intro, element("div", *charts, class_="charts"))


def _steps(by_evaluation: Mapping[int, Mapping[str, float]]) -> Html:
    """A row for each evaluation: the worst of all trajectories."""
    rows = [
        [str(number), _number(metrics["cosine"]), decibels(metrics["snr_db"])]
        for number, metrics in by_evaluation.items()
    ]
    title = element("summary", "Latents by evaluation, the worst of all trajectories")
    return (
        element("details", title, table(["evaluation", "cosine", "SNR"], rows, numbers=(0, 1, 2))) if rows else Html()
    )


def _comparisons(report: CheckReport) -> Html:
    rows = []
    for entry in report.worst_first():
        measured, limits = entry.metrics.named(), entry.limits.named()
        cells = [_measured(measured, limits, name) for name in METRICS]
        rows.append([entry.component, entry.bucket, entry.input, entry.output, *cells, _badge(entry.passed)])
    head = ["component", "bucket", "input", "output", *METRICS.values(), ""]
    title = f"All {len(rows)} comparisons of components, the worst first"
    return element("details", element("summary", title), table(head, rows)) if rows else Html()


def _measured(values: Mapping[str, float], limits: Mapping[str, float], name: str) -> str:
    if name not in values:
        return ""
    return f"{_number(values[name])} ({'≤' if name in AT_MOST else '≥'} {show(limits[name])})"


# --- what was checked -------------------------------------------------------------------------------------------------


def _recipe(bundle: Bundle) -> Html:
    text = toml(bundle.recipe.to_json())
    return element("details", element("summary", f"Recipe {bundle.recipe.name}"), element("pre", text))


def _environment(report: CheckReport, bundle: Bundle) -> Html:
    model = bundle.model
    facts = {
        "bundle": report.bundle,
        "reference": report.model + (f" at {report.revision}" if report.revision else ""),
        "reference differs from diffusers' defaults in": "; ".join(report.changes) or "nothing",
        "built from": str(model.get("name")) + (f" at {model['revision']}" if model.get("revision") else ""),
        "pipeline": f"{model.get('pipeline')}, family {bundle.family}",
        "device": f"{report.backend}: {_pairs(report.device)}",
        "built on": _pairs(bundle.device),
        "checked with": _pairs(report.versions),
        "built with": _pairs(bundle.tools),
    }
    listed = [part for key, text in facts.items() for part in (element("dt", key), element("dd", text))]
    return element("details", element("summary", "Model, device and versions"), element("dl", *listed), open="")


def _files(bundle: Bundle) -> Html:
    rows = [[name, f"{entry.size:,}", element("code", entry.sha256)] for name, entry in sorted(bundle.files.items())]
    size = sum(entry.size for entry in bundle.files.values())
    title = f"{len(rows)} files with their sha256, {size:,} bytes; all were verified before the check"
    listed = table(["file", "bytes", "sha256"], rows, numbers=(1,))
    return element("details", element("summary", title), listed)


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in values.items())


# --- words ------------------------------------------------------------------------------------------------------------


def _word(passed: bool) -> str:
    return "passed" if passed else "FAILED"


def _badge(passed: bool) -> Html:
    return element("span", _word(passed), class_="good" if passed else "bad")


def _number(value: float) -> str:
    return show(value) if math.isfinite(value) else {"nan": "NaN", "inf": "∞", "-inf": "-∞"}[str(float(value))]


def _least(values: Iterable[float]) -> float:
    """NaN is worse than any number."""
    numbers = [*values]
    return math.nan if any(map(math.isnan, numbers)) else min(numbers)
