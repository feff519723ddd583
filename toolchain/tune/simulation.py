"""A component with some of its layers quantised, computed by torch: what that does to its output.

The weights hold exactly what a weight file would; products are summed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from toolchain.check.measure import Arrays, Feed
from toolchain.models.component import Component
from toolchain.precision.rounding import stored_scales, stored_values, widened
from toolchain.precision.stored import Stored
from toolchain.recipe import Quantize
from toolchain.sampler.table import SamplerTable, split
from toolchain.signature import GraphSpec
from toolchain.tune.inputs import Inputs, Rounding
from toolchain.weights.derived import FLOAT_DTYPES

NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
"""A component's type -> its name in `FLOAT_DTYPES`."""


class Simulation:
    """A component's reference on inputs that were recorded.

    network  the checkpoint's module, in which weights have their names in the checkpoint
    table    the sampler's that trajectories follow
    """

    def __init__(
        self,
        component: Component,
        module: nn.Module,
        spec: GraphSpec,
        feeds: Sequence[Feed],
        table: SamplerTable,
    ) -> None:
        self.network = module.get_submodule(component.prefix.rstrip("."))
        self.feeds, self._spec, self._table = feeds, spec, table
        self._carries = carries(table)
        # Written for a GPU as well, and only run on a CPU so far.
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._module = module.to(self._device)
        self._references = [f.reference or self._call(f) for f in feeds]

    def error(self, weights: Iterable[str], table: Quantize, dtype: str, inputs: Inputs | None = None) -> float:
        """What quantising these weights as `table` says does to the output: the power of the difference over that of
        the signal, on average over the inputs. A denoising step's is carried to the end of its trajectory.

        inputs  of the component's layers, where `table` rounds activations
        """
        roundings = {} if inputs is None else inputs.roundings(table, self._peaks)
        with rounded(self.network, weights, table, dtype, roundings):
            outputs = [self._call(feed) for feed in self.feeds]
        pairs = zip(self.feeds, self._references, outputs, strict=True)
        noise = [self._differences(feed, reference, output) for feed, reference, output in pairs]
        return float(np.mean(noise) / self._signal)

    def _peaks(self, name: str) -> NDArray[np.float32]:
        """The largest magnitude of a linear layer's weight for each of its inputs."""
        peaks: NDArray[np.float32] = self.network.get_parameter(name).abs().amax(0).cpu().numpy()
        return peaks

    @cached_property
    def _signal(self) -> float:
        """The power of what a component gives; of the denoiser's at the ends of the trajectories."""
        last = self._table.evaluations
        ends = [r for f, r in zip(self.feeds, self._references, strict=True) if f.evaluation in (None, last)]
        return float(np.mean([_power(_given(reference)) for reference in ends]))

    def _differences(self, feed: Feed, reference: Arrays, output: Arrays) -> float:
        if feed.evaluation is None:
            return _power(_given(output) - _given(reference))
        carried = self._carries[feed.evaluation - 1]
        states = slice(len(carried))  # a graph may have room for more than its table uses
        return _power(np.tensordot(carried, output["next_state"][states] - reference["next_state"][states], 1))

    def _call(self, feed: Feed) -> Arrays:
        given = (torch.from_numpy(np.ascontiguousarray(feed.inputs[t.name])) for t in self._spec.inputs)
        with torch.inference_mode():
            outputs = self._module(*(tensor.to(self._device) for tensor in given))
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        return {t.name: o.cpu().numpy() for t, o in zip(self._spec.outputs, outputs, strict=True)}


def carries(table: SamplerTable) -> NDArray[np.float64]:
    """[T, states]: what of an error in the states after each evaluation is in the latents at the end, if the network
    did not answer to it. Errors of single layers along whole trajectories go with it (0.99 of their logarithms)."""
    a = split(table.rows)[0].astype(np.float64)
    rows = [np.eye(a.shape[1])[0]]
    for matrix in a[:0:-1]:
        rows.append(rows[-1] @ matrix)
    return np.stack(rows[::-1])


def _given(arrays: Arrays) -> NDArray[Any]:
    """The latents after a step, or the first output of a component that is no integer."""
    if "next_state" in arrays:
        latents: NDArray[Any] = arrays["next_state"][0]
        return latents
    return next(array for array in arrays.values() if np.issubdtype(array.dtype, np.floating))


def _power(array: NDArray[Any]) -> float:
    return float(np.square(array, dtype=np.float64).mean())


@contextmanager
def rounded(
    network: nn.Module, weights: Iterable[str], table: Quantize, dtype: str, inputs: Mapping[str, Rounding]
) -> Iterator[None]:
    """The weights of these names as `table` stores them in a component of type `dtype`, and the inputs of their layers
    rounded; as before at the end."""
    with ExitStack() as undo:
        for name in weights:
            module, _, attribute = name.rpartition(".")
            owner = network.get_submodule(module)
            parameter, rounding = getattr(owner, attribute), inputs.get(name)
            undo.callback(setattr, parameter, "data", parameter.data)
            parameter.data = _stored(owner, parameter.data, table, dtype, rounding)
            if rounding is not None:
                undo.callback(owner.register_forward_pre_hook(_rounding_hook(rounding)).remove)
        yield


def _rounding_hook(rounding: Rounding) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """Rounds the input of a layer to eight bits."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x, *others = args
        if rounding.factors is not None:
            x = x / torch.from_numpy(rounding.factors).to(x.device)
        steps = x / rounding.scale
        if rounding.bits == "float8":
            steps = steps.clamp(-448, 448).to(torch.float8_e4m3fn).to(x.dtype)
        else:
            steps = steps.round().clamp(-128, 127)
        return steps * rounding.scale, *others

    return hook


def _stored(owner: nn.Module, weight: Tensor, table: Quantize, dtype: str, rounding: Rounding | None) -> Tensor:
    """A weight after its way through a weight file."""
    values = weight.cpu().numpy()
    if rounding is not None and rounding.factors is not None:
        values = values * rounding.factors
    inputs_first = isinstance(owner, nn.ConvTranspose2d)
    # Blocks lie along the inputs of a linear layer, [outputs, inputs].
    stored = Stored(table.weights, values.shape, 1 if inputs_first or table.block else 0, table.block)
    scales = stored_scales(values, stored, table.scales, FLOAT_DTYPES[NAMES[dtype]])
    return torch.from_numpy(widened(stored_values(values, scales, stored), scales, stored)).to(weight.device)
