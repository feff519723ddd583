"""One component against its reference on the same inputs, with Polygraphy: it runs the engine, and measures.

Polygraphy's metrics are one-sided: the reference comes first, or SNR would take the engine's output for the signal.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata
from polygraphy.comparator import (
    Comparator,
    CosineSimilarityCompareFunc,
    RunResults,
    SimpleCompareFunc,
    SnrCompareFunc,
)
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from toolchain.check.report import Entry, Metrics
from toolchain.engines.backend import Engine
from toolchain.engines.buffers import Memory
from toolchain.errors import EngineError
from toolchain.recipe import Tolerance
from toolchain.runtime.engines import BoundEngine
from toolchain.signature import GraphSpec

if TYPE_CHECKING:
    from torch import nn

Arrays = dict[str, NDArray[Any]]
OpenMemory = Callable[[], Memory]
OpenEngine = Callable[[Memory], Engine]
REFERENCE, ENGINE = "reference", "engine"


@dataclass(frozen=True)
class Feed:
    """One set of inputs, and its label in the report.

    evaluation  of the denoiser, counted from 1; None for what is not on a trajectory
    reference   the reference's outputs, where it has run on the inputs already
    """

    label: str
    inputs: Arrays
    evaluation: int | None = None
    reference: Arrays | None = None


def call(module: nn.Module, spec: GraphSpec, inputs: Mapping[str, NDArray[Any]]) -> Arrays:
    """The reference's outputs by name; `module` takes and returns tensors in the order of `spec`."""
    with torch.inference_mode():
        outputs = module(*(torch.from_numpy(np.ascontiguousarray(inputs[t.name])) for t in spec.inputs))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    return {t.name: o.numpy() for t, o in zip(spec.outputs, outputs, strict=True)}


class EngineRunner(BaseRunner):  # type: ignore[misc]
    """An engine of the bundle, opened when Polygraphy activates it, with every output bound."""

    def __init__(self, open_memory: OpenMemory, open_engine: OpenEngine, spec: GraphSpec) -> None:
        super().__init__(name=ENGINE)
        self._open_memory, self._open_engine = open_memory, open_engine
        self._spec = spec
        self._memory: Memory | None = None
        self._bound: BoundEngine | None = None

    def activate_impl(self) -> None:
        """Opens the engine and its memory."""
        self._memory = self._open_memory()
        self._bound = BoundEngine(self._open_engine(self._memory), self._memory)

    def get_input_metadata_impl(self) -> Any:
        """Names, dtypes and shapes of the inputs."""
        return _metadata(self._spec)

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> Arrays:
        """The outputs of one launch."""
        assert self._bound is not None
        assert self._memory is not None
        started = time.perf_counter()
        outputs = self._bound(feed_dict)
        arrays = self._memory.read(*(outputs[t.name] for t in self._spec.outputs))
        self.inference_time = time.perf_counter() - started
        return {t.name: array for t, array in zip(self._spec.outputs, arrays, strict=True)}

    def deactivate_impl(self) -> None:
        """Closes the engine and its memory."""
        bound, memory = self._bound, self._memory
        self._bound = self._memory = None
        if bound is not None:
            bound.close()
        if memory is not None:
            memory.close()


def compare_engine(
    component: str,
    bucket: str,
    spec: GraphSpec,
    module: nn.Module,
    open_memory: OpenMemory,
    open_engine: OpenEngine,
    feeds: Sequence[Feed],
    tolerance: Tolerance,
) -> tuple[list[Entry], list[Arrays]]:
    """An entry for each feed and output, and the reference's outputs for each feed.

    Raises EngineError when the engine cannot be opened or run.
    """
    references = [call(module, spec, f.inputs) if f.reference is None else f.reference for f in feeds]
    with quiet():
        try:
            results = Comparator.run(
                [EngineRunner(open_memory, open_engine, spec)], data_loader=[f.inputs for f in feeds]
            )
        except PolygraphyException as error:
            raise EngineError("the engine cannot be compared", where=f"{component} {bucket}", got=error) from error
        engines = [{t.name: np.asarray(outputs[t.name]) for t in spec.outputs} for outputs in results[ENGINE]]
    entries = [
        Entry(component, bucket, feed.label, t.name, *measured, feed.evaluation)
        for feed, reference, engine in zip(feeds, references, engines, strict=True)
        for t in spec.outputs
        for measured in [measure(reference[t.name], engine[t.name], tolerance)]
    ]
    return entries, references


def measure(
    reference: NDArray[Any], engine: NDArray[Any], tolerance: Tolerance
) -> tuple[Metrics, Metrics, tuple[str, ...]]:
    """(measured, limits, names of the metrics that failed) of one output. Both arrays have one shape and dtype.

    Floating point: all three limits of `tolerance`, and no NaN or infinity. uint8 is a picture, the rounding of a
    float output that is compared as well: values that differ by d levels before rounding differ by ceil(d) levels at
    most after it, so ceil(255 * max_error) is what the tolerance allows the levels. Other integers must be equal.
    """
    floating = np.issubdtype(reference.dtype, np.floating)
    results = RunResults()
    for name, array in ((REFERENCE, reference), (ENGINE, engine)):
        # float64, because sums over float32 leave the cosine of equal tensors at 1 - 1e-7; Polygraphy refuses arrays
        # that are not contiguous.
        wide = np.ascontiguousarray(array, np.float64 if floating else array.dtype)
        results.add([{"output": wide}], runner_name=name)
    if not floating:
        limit = float(math.ceil(255 * tolerance.max_error)) if reference.dtype == np.uint8 else 0.0
        (exact,) = _compare(results, [SimpleCompareFunc(check_error_stat="max", atol=limit, rtol=0)])
        return Metrics(difference=exact.max_absdiff), Metrics(difference=limit), () if exact else ("difference",)
    # Polygraphy's relative error is element by element, which explodes near zero: ours is absolute, by the reference.
    scale = float(np.abs(reference).max()) or 1.0
    simple = SimpleCompareFunc(check_error_stat="max", atol=tolerance.max_error * scale, rtol=0)
    cosine, snr, largest = _compare(
        results, [CosineSimilarityCompareFunc(tolerance.cosine), SnrCompareFunc(tolerance.snr_db), simple]
    )
    metrics = Metrics(cosine.cosine_similarity, snr.snr, largest.max_absdiff / scale)
    verdicts = {"cosine": bool(cosine), "snr_db": bool(snr), "max_error": bool(largest), "finite": _finite(results)}
    limits = Metrics(tolerance.cosine, tolerance.snr_db, tolerance.max_error)
    return metrics, limits, tuple(name for name, passed in verdicts.items() if not passed)


def _compare(results: Any, functions: list[Any]) -> list[Any]:
    """Polygraphy's result object of each function; it holds the value and is true where the limit is kept."""
    with quiet():
        accuracy = Comparator.compare_accuracy(results, compare_func=functions)
    return [result[REFERENCE, ENGINE][0]["output"] for result in accuracy]


def _finite(results: Any) -> bool:
    with quiet():
        return bool(Comparator.validate(results, check_inf=True, check_nan=True))


def _metadata(spec: GraphSpec) -> Any:
    metadata = TensorMetadata()
    for tensor in spec.inputs:
        metadata.add(tensor.name, np.dtype(tensor.dtype), tensor.shape)
    return metadata


@contextmanager
def quiet() -> Iterator[None]:
    """Silences Polygraphy's log, which calls a missed limit an error, and numpy's NaN warnings."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL), np.errstate(all="ignore"):
        yield
