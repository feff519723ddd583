"""Steps of torch's own cuBLAS and cuDNN work on our stream: launched kernel by kernel, captured, and as one WHILE node.

What is compared is not an engine but how work gets onto the GPU: the same network, of convolutions, norms and attention
in the sizes of Stable Diffusion, drives a state through some steps with `CapturingMemory` in each of its three ways, by
torch's own graphs, and by torch alone, whose latents all others must equal.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from benchmarks.gpu_run.record import Record, is_pretended
from toolchain.cuda.capturing import CapturingMemory
from toolchain.cuda.loop import by_turns
from toolchain.cuda.memory import DeviceBuffer

GUIDANCE = 5.0
REPEATS = 5
WAYS = ("off", "step", "loop")


@dataclass(frozen=True)
class Size:
    """Latents of 4 channels and `latent` squared, for two passes of guidance."""

    latent: int = 64
    widths: tuple[int, ...] = (320, 640, 1280)
    tokens: int = 77
    context: int = 768
    head: int = 64
    dtype: str = "float16"
    steps: int = 20


TINY = Size(latent=8, widths=(32, 64), tokens=5, context=16, head=16, dtype="float32", steps=4)


class Block(nn.Module):
    """A residual block, then attention to itself and to the text."""

    def __init__(self, inside: int, width: int, size: Size) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.GroupNorm(32, channels) for channels in (inside, width, width))
        self.convs = nn.ModuleList(nn.Conv2d(channels, width, 3, padding=1) for channels in (inside, width))
        self.skip = nn.Conv2d(inside, width, 1)
        self.time = nn.Linear(128, width)
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.own, self.text = nn.Linear(width, 2 * width), nn.Linear(size.context, 2 * width)
        self.head = size.head

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        h = self.convs[0](functional.silu(self.norms[0](x))) + self.time(time)[:, :, None, None]
        x = self.skip(x) + self.convs[1](functional.silu(self.norms[1](h)))
        tokens = self.norms[2](x).flatten(2).transpose(1, 2)
        for keys_and_values in (self.own(tokens), self.text(text)):
            q, (k, v) = self._heads(self.query(tokens)), map(self._heads, keys_and_values.chunk(2, -1))
            mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            tokens = tokens + self.out(mixed)
        return x + tokens.transpose(1, 2).reshape(x.shape)

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (-1, self.head)).transpose(1, 2)


class Network(nn.Module):
    """Down and up again, with skips."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        widths = size.widths
        self.enter, self.leave = nn.Conv2d(4, widths[0], 3, padding=1), nn.Conv2d(widths[0], 4, 3, padding=1)
        self.down = nn.ModuleList(Block(a, b, size) for a, b in zip((widths[0], *widths), widths, strict=False))
        self.up = nn.ModuleList(Block(2 * a, b, size) for a, b in zip(widths, (widths[0], *widths), strict=False))

    def forward(self, x: torch.Tensor, time: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        x, kept = self.enter(x), []
        for index, block in enumerate(self.down):
            x = block(functional.avg_pool2d(x, 2) if index else x, time, text)
            kept.append(x)
        for index, block in reversed([*enumerate(self.up)]):
            x = block(torch.cat([x, kept[index]], 1), time, text)
            x = functional.interpolate(x, scale_factor=2.0) if index else x
        return self.leave(x)


class Cuda:
    """torch on a memory's stream. What it allocates while it is captured stays its own, as long as this lives."""

    device = "cuda"

    def __init__(self, memory: CapturingMemory) -> None:
        self._stream = torch.cuda.ExternalStream(memory.stream)
        self._pool = torch.cuda.MemPool()

    def tensor(self, buffer: DeviceBuffer) -> torch.Tensor:
        class Interface:
            __cuda_array_interface__ = {  # noqa: RUF012
                "shape": buffer.shape,
                "typestr": buffer.dtype.str,
                "data": (buffer.address, False),
                "version": 3,
            }

        return torch.as_tensor(Interface(), device="cuda")

    def enqueue(self, work: Callable[[], None]) -> None:
        with torch.inference_mode(), torch.cuda.stream(self._stream), torch.cuda.use_mem_pool(self._pool):
            work()


class Pretended:
    """torch's kernels for the CPU as kernels of the pretended GPU, to rehearse what the host does."""

    device = "cpu"

    def __init__(self, memory: CapturingMemory) -> None:
        self._stream = memory.stream

    def tensor(self, buffer: DeviceBuffer) -> torch.Tensor:
        from cuda.bindings import runtime

        there = runtime._view(buffer.address, buffer.nbytes, "torch")
        return torch.from_numpy(there.view(buffer.dtype).reshape(buffer.shape))

    def enqueue(self, work: Callable[[], None]) -> None:
        from cuda.bindings import runtime

        runtime._enqueue(self._stream, torch.inference_mode()(work), "torch")


@dataclass
class Inputs:
    """What all ways share, as torch's own tensors."""

    size: Size
    device: str

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        dtype = getattr(torch, self.size.dtype)
        self.network = Network(self.size).to(self.device, dtype).eval()
        self.noise = torch.randn(1, 4, self.size.latent, self.size.latent).to(dtype).numpy()
        self.text = torch.randn(2, self.size.tokens, self.size.context).to(self.device, dtype)
        self.times = torch.randn(self.size.steps, 128).to(self.device, dtype)

    def step(self, source: torch.Tensor, target: torch.Tensor, counter: torch.Tensor) -> None:
        """A step of Euler with guidance, whose number is known to the device alone."""
        time_ = self.times.index_select(0, counter).expand(2, -1)
        plain, guided = self.network(torch.cat([source, source]), time_, self.text).chunk(2)
        target.copy_(source - (plain + GUIDANCE * (guided - plain)) / self.size.steps)
        counter.add_(1)


class Driven:
    """Two states that take turns, in one of `CapturingMemory`'s ways."""

    def __init__(self, inputs: Inputs, way: str, torch_on: Any) -> None:
        self.memory = CapturingMemory(way)
        self._noise = inputs.noise
        self._torch = torch_on(self.memory)
        self._states = [self.memory.zeros(inputs.noise.shape, inputs.noise.dtype) for _ in range(2)]
        self._counter = self.memory.zeros((1,), np.int64)
        ends = [self._torch.tensor(state) for state in self._states]
        counter = self._torch.tensor(self._counter)
        works = [partial(inputs.step, *pair, counter) for pair in (ends, ends[::-1])]
        launches = []
        for work in works:
            self.memory.write(self._counter, 0)  # each capture runs its step once
            launches.append(self.memory.capture(partial(self._torch.enqueue, work)))
        self.loop: Any = self.memory.loop(*launches)
        self.run: Callable[[int], None] = self.loop or partial(by_turns, *launches)

    def reset(self) -> None:
        self.memory.write(self._states[0], self._noise)
        self.memory.write(self._counter, 0)

    def latents(self, steps: int) -> np.ndarray:
        self.reset()
        self.run(steps)
        return self.memory.read(self._states[steps % 2])[0]

    def times(self, steps: int) -> tuple[float, float]:
        """Milliseconds of the GPU and microseconds of the host, per step."""
        self.reset()
        self.memory.synchronize()
        first, started = self.memory.mark(), time.perf_counter()
        self.run(steps)
        host = time.perf_counter() - started
        last = self.memory.mark()
        self.memory.synchronize()
        return self.memory.elapsed_ms(first, last) / steps, host / steps * 1e6


def compared(latents: np.ndarray, expected: np.ndarray) -> dict[str, Any]:
    return {
        "same_bytes": latents.tobytes() == expected.tobytes(),
        "largest_difference": float(np.abs(latents.astype(np.float64) - expected).max()),
        "finite": bool(np.isfinite(latents).all()),
    }


def by_torch_alone(inputs: Inputs, steps: int) -> tuple[np.ndarray, float]:
    """Latents, and milliseconds per step as the host's clock has them."""
    ends = [torch.from_numpy(inputs.noise).to(inputs.device).clone() for _ in range(2)]
    counter = torch.zeros(1, dtype=torch.int64, device=inputs.device)
    wait = torch.cuda.synchronize if inputs.device == "cuda" else lambda: None
    with torch.inference_mode():
        wait()
        started = time.perf_counter()
        for index in range(steps):
            inputs.step(*(ends if index % 2 == 0 else ends[::-1]), counter)
        wait()
    return ends[steps % 2].cpu().numpy(), (time.perf_counter() - started) / steps * 1e3


def by_torchs_graph(inputs: Inputs, steps: int) -> dict[str, float]:
    """The same two steps in two graphs of `torch.cuda.graph`."""
    ends = [torch.from_numpy(inputs.noise).to("cuda") for _ in range(2)]
    counter = torch.zeros(1, dtype=torch.int64, device="cuda")
    graphs = [torch.cuda.CUDAGraph() for _ in range(2)]
    for graph, pair in zip(graphs, (ends, ends[::-1]), strict=True):
        with torch.inference_mode(), torch.cuda.graph(graph):
            inputs.step(*pair, counter)
    found = []
    for _ in range(REPEATS):
        counter.zero_()
        events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
        events[0].record()
        started = time.perf_counter()
        for index in range(steps):
            graphs[index % 2].replay()
        host = time.perf_counter() - started
        events[1].record()
        torch.cuda.synchronize()
        found.append((events[0].elapsed_time(events[1]) / steps, host / steps * 1e6))
    return medians(found)


def medians(found: Iterable[tuple[float, float]]) -> dict[str, float]:
    gpu, host = zip(*found, strict=True)
    return {"gpu_ms_per_step": statistics.median(gpu), "host_us_per_step": statistics.median(host)}


def idle_share(spans: Iterable[tuple[float, float]]) -> dict[str, float]:
    """(start, end) of everything that the GPU did, in any unit -> how much of it all it did nothing."""
    ordered = sorted(spans)
    busy, last = 0.0, ordered[0][0]
    for start, end in ordered:
        busy += max(0.0, end - max(start, last))
        last = max(last, end)
    whole = last - ordered[0][0]
    return {"spans": len(ordered), "idle_share": 1 - busy / whole if whole else 0.0}


def profiled(driven: Driven, steps: int) -> dict[str, float]:
    """By CUPTI, which sees each kernel, also within graphs."""
    from torch.profiler import ProfilerActivity, profile

    driven.reset()
    driven.memory.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        driven.run(steps)
        driven.memory.synchronize()
    events = [e for e in found.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    return idle_share((e.time_range.start, e.time_range.end) for e in events)


def measure(record: Record) -> None:
    measure_size(record, TINY if is_pretended() else Size())


def measure_size(record: Record, size: Size) -> None:
    torch_on = Pretended if is_pretended() else Cuda
    inputs = Inputs(size, torch_on.device)
    numbers = {size.steps, size.steps // 2 + 1}  # an even and an odd one
    record("network", {**vars(size), "parameters": sum(p.numel() for p in inputs.network.parameters())})
    expected: dict[int, np.ndarray] = {}

    def alone() -> dict[str, Any]:
        for steps in sorted(numbers):
            expected[steps], _ = by_torch_alone(inputs, steps)
        digest = hashlib.sha256(expected[size.steps].tobytes()).hexdigest()
        timed = [by_torch_alone(inputs, size.steps)[1] for _ in range(REPEATS)]
        return {"clock_ms_per_step": statistics.median(timed), "sha256": digest}

    record.stage("torch", alone)
    ways: dict[str, Driven] = {}

    def driven(way: str) -> dict[str, Any]:
        ways[way] = made = Driven(inputs, way, torch_on)
        equal = {str(steps): compared(made.latents(steps), expected[steps]) for steps in sorted(numbers)}
        again = compared(made.latents(size.steps), made.latents(size.steps))
        return {
            "equal": equal,
            "repeats": again["same_bytes"],
            "captures": made.memory.counters.captures,
            "while_node": made.loop is not None and made.loop._while is not None,
            **medians([made.times(size.steps) for _ in range(REPEATS)]),
        }

    for way in WAYS:
        record.stage(way, partial(driven, way))
    if torch_on is Cuda:
        record.stage("torchs_graph", lambda: by_torchs_graph(inputs, size.steps))
        # Last, because a profiler may not bear with a WHILE node.
        for way in WAYS:
            if way in ways:
                record.stage(f"idle.{way}", partial(profiled, ways[way], size.steps))
    for made in ways.values():
        made.memory.close()
