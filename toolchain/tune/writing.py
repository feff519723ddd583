"""The text of a tuned recipe: what was chosen, each with the number that earned it."""

from __future__ import annotations

from dataclasses import replace

from toolchain.check.report import show
from toolchain.tune.frozen import write_recipe_text
from toolchain.tune.result import Tuned, overflow_words


def with_text(tuned: Tuned) -> Tuned:
    """With the text of its recipe, ready to build."""
    notes: dict[str, str | list[str]] = {}
    header = [f"Tuned by diffbuild tune for {tuned.model} with {tuned.backend}: {_versions(tuned)}."]
    if tuned.overflows:
        header.append("Modules in keep_float32 leave float16's range on real inputs; how far is behind each.")
        notes |= _overflow_notes(tuned)
    if tuned.chosen is not None:
        header.append(_reached(tuned))
        notes |= _quantize_notes(tuned)
    return replace(tuned, text=write_recipe_text(tuned.recipe, header, notes))


def _versions(tuned: Tuned) -> str:
    return ", ".join(f"{name} {version}" for name, version in tuned.versions.items())


def _reached(tuned: Tuned) -> str:
    assert tuned.chosen is not None
    assert tuned.held_out is not None
    ours, others = tuned.chosen.measured.summary, tuned.held_out.summary
    budget = ", ".join(f"{name} >= {limit:.9g}" for name, limit in tuned.budget.items())
    seeds = ", ".join(map(str, tuned.seeds))
    step = f", cosine of a step {show(ours['cosine'])} at least" if "cosine" in ours else ""
    return (
        f"Budget {budget}. With {tuned.chosen.share:.1%} of a picture's multiply-accumulates quantised, "
        f"{tuned.prompts} prompts with seed {seeds} reach PSNR {ours['psnr_db']:.1f} dB at least and "
        f"{ours['median_psnr_db']:.1f} dB in the median, SSIM {show(ours['ssim'])} at least{step}, against the "
        f"unquantised engines; with other seeds {others['psnr_db']:.1f} and {others['median_psnr_db']:.1f} dB. Behind "
        "an exclusion stands what quantising it costs: its share of the whole error, and of the work."
    )


def _quantize_notes(tuned: Tuned) -> dict[str, str | list[str]]:
    """Comments of the keys of quantize tables."""
    notes: dict[str, str | list[str]] = {}
    by_name = {(unit.component, unit.pattern): unit for unit in tuned.units}
    total, macs = sum(u.error for u in tuned.units) or 1.0, sum(u.macs for u in tuned.units) or 1
    for name, component in tuned.recipe.components.items():
        if component.quantize is None:
            continue
        path = f"components.{name}.quantize"
        units = [by_name.get((name, pattern)) for pattern in component.quantize.exclude]
        if units:
            notes[f"{path}.exclude"] = [
                "" if unit is None else f"{unit.error / total:.2%} of the error, {unit.macs / macs:.2%} of the work"
                for unit in units
            ]
        for key in dict.fromkeys(trial.key for trial in tuned.trials if trial.component == name):
            tried = [trial for trial in tuned.trials if (trial.component, trial.key) == (name, key)]
            errors = ", ".join(f"{trial.value} {trial.error:.3g}" for trial in tried)
            least = min(tried, key=lambda trial: trial.error).value == getattr(component.quantize, key)
            notes[f"{path}.{key}"] = f"error {errors}" + ("" if least else ": but pictures are better with this")
    return notes


def _overflow_notes(tuned: Tuned) -> dict[str, str | list[str]]:
    """Comments of `keep_float32`, and of the type of a whole component."""
    notes: dict[str, str | list[str]] = {}
    for name, component in tuned.recipe.components.items():
        modules = {o.module: overflow_words(o) for o in tuned.overflows if o.component == name}
        if "" in modules:
            notes[f"components.{name}.dtype"] = modules[""]
        elif modules:
            notes[f"components.{name}.keep_float32"] = [modules.get(kept, "") for kept in component.keep_float32]
    return notes
