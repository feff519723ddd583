"""Sampler tables: those of the bundle, and others where they can be compiled."""

from __future__ import annotations

import json
import time
from collections import OrderedDict
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

from toolchain.bundle.bundle import Bundle
from toolchain.errors import BundleError, RequestError, SamplerError
from toolchain.runtime.observer import Observer
from toolchain.runtime.request import Size
from toolchain.sampler.schedulers import parse, steps_of
from toolchain.sampler.table import SamplerTable, describe_tables, table_name

CACHED = 64


class Tables:
    """An LRU cache of sampler tables."""

    def __init__(self, bundle: Bundle, observer: Observer) -> None:
        self._bundle, self._observer = bundle, observer
        self._known: OrderedDict[str, SamplerTable] = OrderedDict()

    def __len__(self) -> int:
        return len(self._known)

    def __call__(
        self, scheduler: str, steps: int, size: Size, skip: int, tell: Callable[[str], None]
    ) -> tuple[SamplerTable, float]:
        """A table, and the milliseconds that compiling it took; `tell` is called with a message before that. Takes and
        raises what `Pipeline.table` does."""
        settings = self._bundle.settings
        spec, tokens = parse(scheduler), settings.tokens(*size)
        steps = steps_of(spec, settings.scheduler, steps)
        name = table_name(spec.canonical, steps, tokens=tokens, skip=skip)
        took = 0.0
        if name not in self._known:
            started = time.perf_counter()
            if name in self._bundle.samplers:
                self._known[name] = load_table(self._bundle, name)
            else:
                if find_spec("diffusers") is not None:  # else the next line raises
                    tell(f"compiling the sampler table {name}")
                with self._observer.stage("table"):
                    self._known[name] = _compile(self._bundle, name, spec.canonical, steps, tokens, skip)
                took = (time.perf_counter() - started) * 1e3
            if len(self._known) > CACHED:
                self._known.popitem(last=False)
        self._known.move_to_end(name)
        return self._known[name], took


def load_table(bundle: Bundle, name: str) -> SamplerTable:
    """A table of the bundle by its name there. BundleError where it cannot be read, and SamplerError with the reason
    for one that was left out of a range of steps."""
    path = bundle.path / bundle.samplers[name]
    try:
        tables: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BundleError("a sampler table cannot be read", where=path, got=error) from error
    table = tables.get(name) if isinstance(tables, dict) else None
    if isinstance(table, str):
        raise SamplerError(table, where=name, hint="take another number of steps")
    if table is None:
        raise BundleError("a sampler table is missing", where=path, expected=name, hint="build the bundle again")
    return SamplerTable.from_json(table)


def _compile(bundle: Bundle, name: str, spec: str, steps: int, tokens: int, skip: int) -> SamplerTable:
    settings = bundle.settings
    linear = settings.linear_sigmas
    try:
        from toolchain.sampler.compile import compile_table

        return compile_table(spec, steps, settings.scheduler, skip=skip, tokens=tokens, linear_sigmas=linear)
    except ImportError:
        raise RequestError(
            "the bundle has no table for this scheduler and number of steps",
            expected=", ".join(describe_tables(bundle.samplers)),
            got=name,
            hint="add it to the recipe (sampling.schedulers, step_counts, strengths) and build again, or install "
            "diffbuild[build] to compile it here",
        ) from None
