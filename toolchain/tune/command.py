"""The whole of `diffbuild tune`: what was asked, the search, and the files that it writes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from toolchain.builder.open_model import open_model
from toolchain.builder.plan import make_plan
from toolchain.errors import UsageError
from toolchain.recipe import Recipe, parse_recipe
from toolchain.store.artifacts import Store
from toolchain.store.files import write_atomic
from toolchain.store.outputs import check_apart, check_new_file, check_output
from toolchain.tune.budget import parse_budgets
from toolchain.tune.page import render
from toolchain.tune.pictures import Request
from toolchain.tune.result import Tuned
from toolchain.tune.run import Job, tune


def tune_to_file(
    recipe: Recipe,
    model: str | Path,
    output: Path,
    store: Store,
    progress: Callable[[str], None],
    *,
    budget: Sequence[str] = (),
    prompts: int | None = None,
    by: str = "layer",
    html: str | Path | None = None,
    **origin: Any,
) -> Tuned:
    """Writes the recipe of the largest share quantised that keeps the budget.

    budget   limits such as "psnr_db>=35"
    prompts  how many of the recipe's are drawn, None: all
    by       "layer" or "block": what is left as it is as one
    html     a file to write a page to as well
    origin   revision and config, as in `open_model`

    Raises UsageError for the budget and for an output that exists or cannot be written, before any work is done, what
    `tune` raises, and what planning and opening the model raise.
    """
    limits = parse_budgets(budget)
    if by not in ("layer", "block"):
        raise UsageError("layers are excluded one by one or by blocks", expected="layer or block", got=by)
    check_new_file(output)
    check_output(html)
    check_apart({"--output": output, "--html": html})
    source = open_model(model, **origin, store=store.root)
    make_plan(recipe, source, store)  # what is wrong with the recipe is told first
    job = Job(recipe, source, store, limits, _request(recipe, prompts), by == "block", progress)
    tuned = tune(job)
    parse_recipe(tuned.text, output.stem, str(output))
    write_atomic(output, tuned.text.encode())
    if html is not None:
        write_atomic(Path(html), render(tuned).encode())
    return tuned


def _request(recipe: Recipe, count: int | None) -> Request:
    """The prompts of the recipe's calibration, or of its check; the first `count` of them, each with its seeds."""
    if count is not None and count < 1:
        raise UsageError("too few prompts", expected="1 or more", got=count)
    drawn = recipe.calibration or recipe.check
    return Request(drawn.prompts[:count], drawn.seeds)
