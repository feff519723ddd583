"""One trajectory of a diffusers scheduler, with what it draws and clamps under control. Build time only."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from toolchain.errors import RequestError, SamplerError
from toolchain.sampler.silence import quiet

Clamp = Callable[[int, torch.Tensor, float], torch.Tensor]
"""(index of the evaluation, what is clamped, limit) -> what stands for the clamped values."""


@dataclass(frozen=True)
class Schedule:
    """A diffusers scheduler made ready for one trajectory: `timesteps` [T] are its own from index `start` on."""

    scheduler: Any
    timesteps: torch.Tensor
    step_kwargs: Mapping[str, Any]
    start: int

    @property
    def clamps(self) -> bool:
        """Whether the config asks for a clamped estimate; not every class follows it."""
        return bool(self.scheduler.config.get("clip_sample"))

    def model_input(self, index: int, sample: torch.Tensor) -> torch.Tensor:
        """The scaled sample that the network is given; flow-matching schedulers do not scale."""
        if not hasattr(self.scheduler, "scale_model_input"):
            return sample
        scaled: torch.Tensor = self.scheduler.scale_model_input(sample, self.timesteps[index])
        return scaled

    def step(self, index: int, model_output: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """The sample after evaluation `index`."""
        arguments = (model_output, self.timesteps[index], sample)
        following: torch.Tensor = self.scheduler.step(*arguments, **self.step_kwargs, return_dict=False)[0]
        return following


@contextmanager
def refusals(what: str) -> Iterator[None]:
    """Turns what diffusers raises into a SamplerError, and silences its log lines and warnings."""
    try:
        with quiet():
            yield
    except (RequestError, SamplerError):
        raise
    except Exception as error:
        raise SamplerError(f"diffusers refuses {what}", got=f"{type(error).__name__}: {error}") from error


class _Watch(TorchFunctionMode):
    """While active, `torch.randn` and `randn_like` give `draw()`, tensors of the shape `wide` are not narrowed to
    float32, and clamping one gives `clamp(tensor, limit)`.

    Every diffusers scheduler draws through torch.randn in the end. Some compute in float32 whatever they are given,
    which would bury small coefficients in rounding; only tensors of the sample's shape are kept, not sigmas.
    """

    def __init__(
        self,
        draw: Callable[[], torch.Tensor],
        wide: torch.Size | None,
        clamp: Callable[[torch.Tensor, float], torch.Tensor] | None,
    ) -> None:
        super().__init__()
        self.draw, self.wide, self.clamp = draw, wide, clamp

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _STANDARD_NORMAL:
            return self.draw()
        if func in _OTHER_RANDOM:
            raise SamplerError(
                f"the scheduler draws random numbers with {func.__name__}", expected="standard normal noise"
            )
        if func is torch.Tensor.clamp and self.clamp is not None and args[0].shape == self.wide:
            tensor, low, high = args
            if low != -high:
                raise SamplerError("the scheduler clamps to uneven limits", expected=f"-{high} to {high}", got=low)
            return self.clamp(tensor, float(high))
        result = func(*args, **(kwargs or {}))
        if func in _CASTS and args[0].dtype == torch.float64 and args[0].shape == self.wide:
            return args[0] if result.dtype == torch.float32 else result
        return result


_STANDARD_NORMAL = frozenset({torch.randn, torch.randn_like})
_OTHER_RANDOM = frozenset(
    {torch.rand, torch.rand_like, torch.normal, torch.randint, torch.bernoulli, torch.multinomial, torch.Tensor.normal_}
)
_CASTS = frozenset({torch.Tensor.to, torch.Tensor.float, torch.Tensor.type})


def drive(
    schedule: Schedule,
    sample: torch.Tensor,
    noise: Callable[[int], torch.Tensor],
    model: Callable[[int, torch.Tensor, torch.Tensor], torch.Tensor],
    wide: torch.Size | None = None,
    clamp: Clamp | None = None,
) -> tuple[list[torch.Tensor], tuple[int, ...]]:
    """A trajectory of the real scheduler: the T + 1 samples, and how many noises each evaluation drew.

    noise(index) replaces the draw of an evaluation; model(index, sample, model_input) replaces the network; `clamp`
    the clamping of tensors of the shape `wide`, where it is given.
    """
    counts = [0] * len(schedule.timesteps)
    samples = [sample]

    def draw() -> torch.Tensor:
        index = len(samples) - 1
        counts[index] += 1
        if counts[index] > 1:
            raise SamplerError("the scheduler draws more than one noise for one evaluation", expected="0 or 1")
        return noise(index)

    def clamped(tensor: torch.Tensor, limit: float) -> torch.Tensor:
        assert clamp is not None
        return clamp(len(samples) - 1, tensor, limit)

    watch = _Watch(draw, wide, None if clamp is None else clamped)
    with torch.no_grad(), refusals(type(schedule.scheduler).__name__), watch:
        for index in range(len(schedule.timesteps)):
            output = model(index, samples[-1], schedule.model_input(index, samples[-1]))
            samples.append(schedule.step(index, output, samples[-1]).clone())
    return samples, tuple(counts)
