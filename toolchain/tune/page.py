"""A tuning as a page: one HTML file that needs no network and no scripts."""

from __future__ import annotations

from toolchain.check.charts import decibels
from toolchain.check.markup import Html, element, join, table
from toolchain.check.page import figure, page_head
from toolchain.check.report import show
from toolchain.check.style import STYLE
from toolchain.tune import charts
from toolchain.tune.pictures import Measured, Pixels
from toolchain.tune.result import Point, Trial, Tuned, overflow_words

BARS = 60
"""Layers with a bar; the others, which cost less, are in the table of all."""


def render(tuned: Tuned) -> str:
    """The whole document."""
    title = f"diffbuild tune: {tuned.recipe.name}"
    head = page_head(title, STYLE + charts.STYLE)
    parts = [element("h1", title), _overflows(tuned)]
    if tuned.chosen is not None:
        parts += [_verdict(tuned, tuned.chosen), _curve(tuned, tuned.chosen), _layers(tuned, tuned.chosen)]
        parts += [_options(tuned)]
        if tuned.reference is not None:
            parts.append(_pictures(tuned, tuned.chosen, tuned.reference))
    parts += [element("h2", "Recipe"), element("pre", tuned.text)]
    return f"<!doctype html>\n{element('html', head, element('body', *parts), lang='en')}\n"


def _overflows(tuned: Tuned) -> Html:
    if not tuned.overflows:
        return Html()
    rows = [[o.component, o.module, overflow_words(o), o.kept] for o in tuned.overflows]
    head = ["component", "module", "how far it goes", "in the recipe"]
    return join(element("h2", "Beyond the range of the component's type"), table(head, rows))


def _verdict(tuned: Tuned, chosen: Point) -> Html:
    budget = ", ".join(f"{name} at least {limit:.9g}" for name, limit in tuned.budget.items())
    left = f"{chosen.excluded} of {len(tuned.units)} layers or blocks are left as they are"
    assert tuned.held_out is not None
    lines = [
        element("p", element("strong", f"{chosen.share:.1%}", class_="good"), " of the multiply-accumulates quantised"),
        element("p", f"{tuned.model} with {tuned.backend}; budget: {budget}; {left}.", class_="note"),
        element("p", f"{tuned.prompts} prompts, unquantised against tuned: {_words(chosen.measured)}", class_="note"),
        element("p", f"With other seeds: {_words(tuned.held_out)}", class_="note"),
        element("p", tuned.speed(), class_="note"),
    ]
    return element("section", *lines, class_="verdict good")


def _words(measured: Measured) -> str:
    summary = measured.summary
    least, median = decibels(summary["psnr_db"]), decibels(summary["median_psnr_db"])
    text = f"PSNR {least} at least, {median} in the median, SSIM {show(summary['ssim'])} at least"
    return text + (f", cosine {show(summary['cosine'])} at least" if "cosine" in summary else "")


def _curve(tuned: Tuned, chosen: Point) -> Html:
    note = (
        "PSNR of whole pictures against the unquantised engines' over the share that is quantised: the least as a "
        "solid line, the median as a dashed one. Green is what was chosen; red is with the largest ranges and scales, "
        "with everything quantised and with the chosen exclusions."
    )
    rows = [_row(point, "chosen" if point is chosen else "") for point in tuned.points]
    rows += [_row(point, "largest ranges and scales") for point in tuned.naive]
    head = ["left as they are", "share", "least PSNR", "median PSNR", "least SSIM", "ms a step", ""]
    listed = table(head, rows, numbers=(0, 1, 2, 3, 4, 5))
    return join(
        element("h2", "Error over share"),
        element("p", note, class_="note"),
        charts.pareto(tuned.points, tuned.naive, chosen),
        listed,
    )


def _row(point: Point, about: str) -> list[str]:
    summary = point.measured.summary
    numbers = [decibels(summary["psnr_db"]), decibels(summary["median_psnr_db"]), show(summary["ssim"])]
    return [str(point.excluded), f"{point.share:.1%}", *numbers, f"{point.measured.step_ms:.3g}", about]


def _layers(tuned: Tuned, chosen: Point) -> Html:
    note = (
        "What quantising each alone does to pictures, as a share of all, in the order in which they are excluded: most "
        "error for its multiply-accumulates first. Red ones are left as they are."
    )
    rows = [[u.component, u.pattern, f"{u.error:.3g}", f"{u.macs:,}", f"{u.elements:,}"] for u in tuned.units]
    head = ["component", "layer or block", "squared error", "multiply-accumulates", "elements"]
    if len(rows) > BARS:
        note += f" Shown are the first {BARS}."
    every = element("details", element("summary", f"All {len(rows)}"), table(head, rows, numbers=(2, 3, 4)))
    intro = [element("h2", "Error by layer"), element("p", note, class_="note")]
    return join(*intro, charts.bars(tuned.units, chosen.excluded, BARS), every)


def _options(tuned: Tuned) -> Html:
    note = (
        "Noise over signal of a component's output with everything quantised that can be. The least of each option was "
        "taken, unless the largest ranges and scales without smoothing draw better pictures."
    )
    rows = [[t.component, t.key, str(t.value), f"{t.error:.3g}", _taken(tuned, t)] for t in tuned.trials]
    listed = table(["component", "option", "value", "error", ""], rows, numbers=(3,))
    return join(element("h2", "Options"), element("p", note, class_="note"), listed)


def _taken(tuned: Tuned, trial: Trial) -> str:
    quantize = tuned.recipe.component(trial.component).quantize
    return "taken" if quantize is not None and getattr(quantize, trial.key) == trial.value else ""


def _pictures(tuned: Tuned, chosen: Point, reference: Pixels) -> Html:
    """The first pictures: unquantised, tuned, and everything quantised with the largest ranges."""
    blocks = []
    for number, pixels in enumerate(chosen.measured.pixels):
        naive = tuned.naive[0].measured
        ours, theirs = (decibels(m.psnr_db[number]) for m in (chosen.measured, naive))
        figures = [
            figure(reference[number], "unquantised"),
            figure(pixels, f"tuned, {ours}"),
            figure(naive.pixels[number], f"everything, largest ranges and scales, {theirs}"),
        ]
        blocks.append(element("article", element("div", *figures, class_="three"), class_="picture"))
    return join(element("h2", "Pictures"), element("div", *blocks, class_="pictures"))
