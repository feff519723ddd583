"""What an observer sees of a pipeline, and what its errors do."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from toolchain.errors import RequestError
from toolchain.runtime import pipeline

PAGE = Path(__file__).parents[2] / "docs" / "python.md"
REQUEST: dict[str, Any] = {"prompt": "a red circle", "seed": 3, "scheduler": "model", "steps": 4}
EVALUATIONS = 5  # PNDM evaluates the network once more than it has steps


class Log(toolchain.Observer):
    """Where everything begins, indented by what it lies in. Raises where it is told to."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.depth = 0
        self.raise_at = ""

    @contextmanager
    def _scope(self, line: str) -> Iterator[None]:
        self.lines.append(f"{' ' * self.depth}{line}")
        if self.raise_at == f"begin {line}":
            raise OSError("no space left for metrics")
        self.depth += 1
        try:
            yield
        finally:
            self.depth -= 1
        if self.raise_at == f"end {line}":
            raise OSError("no space left for metrics")

    def stage(self, name: str) -> AbstractContextManager[None]:
        return self._scope(name)

    def evaluation(self, index: int, total: int, timestep: float) -> AbstractContextManager[None]:
        return self._scope(f"{index} of {total} at {timestep:g}")

    def engine(self, name: str) -> AbstractContextManager[None]:
        return self._scope(name)


def test_the_metrics_of_the_documentation(tiny_bundle: Path) -> None:
    """Counts evaluations and sums time by stage."""
    (example,) = re.findall(r"```python\n((?:(?!```).)*class Metrics.*?)```", PAGE.read_text(), flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(example.replace('"sd15"', repr(str(tiny_bundle))), names)
    metrics, pipe = names["metrics"], names["pipe"]
    assert metrics.evaluations == 4  # the recipe's
    stages = ["tokenize", "text", "upload", "denoise", "decode"]
    assert set(metrics.seconds) == set(stages)
    metrics.__init__()
    result = pipe(**REQUEST)
    assert metrics.evaluations == EVALUATIONS
    for name, ms in (("text", result.timings.text_ms), ("denoise", result.timings.denoise_ms)):
        assert metrics.seconds[name] * 1e3 == pytest.approx(ms, rel=0.5, abs=20)
    assert sum(metrics.seconds[name] for name in stages[1:]) <= result.timings.total_ms / 1e3
    pipe.close()


@pytest.mark.parametrize("observer", [3, object(), Log])
def test_what_is_no_observer(observer: Any, tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match="the observer has not an observer's methods"):
        toolchain.load(tiny_bundle, observer=observer)


def test_compiling_a_table_is_a_stage(tiny_bundle: Path) -> None:
    log = Log()
    with toolchain.load(tiny_bundle, open_buckets=1, observer=log) as pipe:
        log.lines.clear()
        result = pipe(**{**REQUEST, "scheduler": "heun"})
        assert log.lines[0] == "table"
        assert result.timings.table_ms > 0
        log.lines.clear()
        pipe(**{**REQUEST, "scheduler": "heun"})
        assert "table" not in log.lines


def test_what_an_observer_sees_in_order(tiny_bundle: Path) -> None:
    log = Log()
    with toolchain.load(tiny_bundle, open_buckets=1, observer=log) as pipe:
        warm = ["tokenize", "text_encoder", "denoiser 1x64x64", "vae_decoder 1x64x64", "vae_encoder 1x64x64"]
        assert log.lines == [line for line in warm if line.split()[0] in ("tokenize", *pipe.bundle.engines)]
        log.lines.clear()
        result = pipe(**REQUEST)
        times = [f"{i} of {EVALUATIONS} at {t:g}" for i, t in enumerate(result.table.timesteps)]
        evaluations = [line for at in times for line in (f" {at}", "  denoiser 1x64x64")]
        # The empty prompt is known from the warm-up.
        text = ["text", " tokenize", " text_encoder"]
        assert log.lines == [*text, "upload", "denoise", *evaluations, "decode", " vae_decoder 1x64x64"]
        log.lines.clear()
        pipe.decode(result.latents)
        assert log.lines == ["vae_decoder 1x64x64"]


def test_nothing_is_wrapped_without_an_observer(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("toolchain.runtime.engines.ObservedEngine", None)
    monkeypatch.setattr(pipeline, "observed", None)
    with toolchain.load(tiny_bundle, open_buckets=1) as pipe:
        assert len(pipe(**REQUEST).images) == 1


@pytest.mark.parametrize("edge", ["begin", "end"])
@pytest.mark.parametrize(
    "where",
    ["tokenize", "text", "text_encoder", "upload", "denoise", "2 of 5 at 501", "denoiser 1x64x64", "decode"],
)
def test_an_observers_error_ends_the_call_alone(
    observed: tuple[toolchain.Pipeline, Log], edge: str, where: str
) -> None:
    pipe, log = observed
    pipe.forget_prompts()
    log.lines.clear()
    log.raise_at = f"{edge} {where}"
    with pytest.raises(OSError, match="no space left for metrics"):
        pipe(**REQUEST)
    assert log.lines[-1].strip() == where or edge == "end"
    log.raise_at = ""
    assert np.array_equal(pipe(**REQUEST).latents, REFERENCE[0])


REFERENCE: list[np.ndarray] = []


@pytest.fixture(scope="module")
def observed(tiny_bundle: Path) -> Iterator[tuple[toolchain.Pipeline, Log]]:
    with toolchain.load(tiny_bundle, open_buckets=1) as pipe:
        REFERENCE.append(pipe(**REQUEST).latents)
    log = Log()
    with toolchain.load(tiny_bundle, open_buckets=1, observer=log) as pipe:
        yield pipe, log


def test_an_observers_error_while_loading_is_the_loads(tiny_bundle: Path) -> None:
    log = Log()
    log.raise_at = "end denoiser 1x64x64"
    with pytest.raises(OSError, match="no space left for metrics"):
        toolchain.load(tiny_bundle, open_buckets=1, observer=log)


def test_an_observer_may_not_use_its_pipeline(tiny_bundle: Path) -> None:
    class Greedy(toolchain.Observer):
        def stage(self, name: str) -> AbstractContextManager[object]:
            return pipe(**REQUEST)  # type: ignore[return-value]

    pipe = toolchain.load(tiny_bundle, warm_up=False, open_buckets=1, observer=Greedy())
    with pipe, pytest.raises(RequestError, match="from inside its own call"):
        pipe(**REQUEST)
