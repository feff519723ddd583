"""What backends take: their tables of a recipe as dataclasses, and the rules that values keep.

`toolchain.recipe` reads them; a default stands here and nowhere else.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal


@dataclass(frozen=True)
class Rule:
    """What a value must satisfy beyond its type; `expected` describes type and range together."""

    expected: str
    holds: Callable[[Any], bool]


Text = Annotated[str, Rule("a non-empty string", lambda text: text.strip() != "")]
Prompt = Annotated[str, Rule("a prompt that is not empty", lambda text: text.strip() != "")]
# Rules have names here rather than stand in the annotations: `get_type_hints` evaluates those where a lambda sees no
# module globals.
Count = Annotated[int, Rule("an integer of 1 or more", lambda n: n >= 1)]
Whole = Annotated[int, Rule("an integer of 0 or more", lambda n: n >= 0)]
Threads = Annotated[int, Rule("an integer from 0 to 1024", lambda n: 0 <= n <= 1024)]
Level = Annotated[int, Rule("an integer from 0 to 5", lambda n: 0 <= n <= 5)]
Streams = Annotated[int, Rule("an integer of -1 or more", lambda n: n >= -1)]


StepCount = Annotated[
    int | str, Rule('a number of steps from 1, or a range such as "1-50"', lambda value: bool(step_range(value)))
]


def step_range(entry: int | str) -> range:
    """The numbers of steps that an entry of `step_counts` stands for; none for what is no such entry."""
    if isinstance(entry, int):
        return range(entry, entry + 1) if entry > 0 else range(0)
    ends = re.fullmatch(r"([1-9][0-9]{0,5})-([1-9][0-9]{0,5})", entry)
    return range(int(ends[1]), int(ends[2]) + 1) if ends else range(0)


@dataclass(frozen=True)
class OnnxRuntimeOptions:
    """Session options of the onnxruntime backend. `threads`: 0 takes the physical cores."""

    optimization: Literal["basic", "extended", "all"] = "all"
    threads: Threads = 0


@dataclass(frozen=True)
class OnnxRuntimeCudaOptions:
    """Options of the onnxruntime_cuda backend; all but the first change how a bundle is run, not what is built.

    cuda_graph   capture each binding; every operator must then have a CUDA kernel
    prefer_nhwc  convolutions with channels last
    tf32         whether float32 products may be rounded; off for a reference
    """

    optimization: Literal["basic", "extended", "all"] = "all"
    cuda_graph: bool = True
    prefer_nhwc: bool = False
    tf32: bool = True


@dataclass(frozen=True)
class OpenVinoOptions:
    """Options of the openvino backend. All but the first change how a bundle is run, not what is built.

    device           what runs the engines: the CPU, or Intel's GPU or NPU
    threads          of a CPU; 0 takes the physical cores
    pin_threads      keep each thread on one core; off where several processes share a CPU
    tensor_parallel  spread each product over the sockets of a CPU that has several
    """

    device: Literal["CPU", "GPU", "NPU"] = "CPU"
    threads: Threads = 0
    pin_threads: bool = True
    tensor_parallel: bool = False


@dataclass(frozen=True)
class TensorRtOptions:
    """Options of the tensorrt backend, under TensorRT's own names where it has them.

    workspace_mb     most scratch memory of one kernel, in MiB; 0 leaves TensorRT's default, all of the GPU's memory
    max_aux_streams  -1 leaves the choice to TensorRT
    build_route      knobs of TensorRT 11.1's performance tuner, "-name=value -name=value"
    strip_plan       leave the weights out of the engines; they are filled in from the bundle's when these are opened
    profile_per_bucket  one engine for all buckets of a component, which share one copy of its weights on the GPU
    tf32             whether float32 products may be rounded; off for a reference
    cuda_graph       how the runtime launches, no part of what is built: one graph per step, one per run, or none
    """

    builder_optimization_level: Level = 3
    workspace_mb: Whole = 0
    tiling_optimization_level: Literal["none", "fast", "moderate", "full"] = "none"
    hardware_compatibility_level: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    strip_plan: bool = False
    profile_per_bucket: bool = False
    max_aux_streams: Streams = -1
    build_route: str = ""
    tf32: bool = True
    cuda_graph: Literal["step", "loop", "off"] = "step"


@dataclass(frozen=True)
class TensorRtRtxOptions:
    """Options of the tensorrt_rtx backend.

    targets              compute capabilities that engines are compiled for; none named stands for all from 8.0 on
    profile_per_bucket   as for tensorrt; a plan then holds the weights once, however many buckets there are
    tf32                 whether float32 products may be rounded; off for a reference
    kernel_specialization  when kernels are made for the shapes of a bucket, of an engine with a profile for each:
                         "eager" before the first run, "lazy" meanwhile, "none" never. A captured CUDA graph keeps the
                         kernels that it was captured with, so that "lazy" comes too late for it
    cuda_graph           as for tensorrt

    The last two say how the runtime launches, and are no part of what is built.
    """

    REFUSED: ClassVar[Mapping[str, str]] = {
        "builder_optimization_level": "kernels are chosen on the user's GPU; no level changes what is built",
        "tiling_optimization_level": "kernels are chosen on the user's GPU; no level changes what is built",
        "hardware_compatibility_level": "TensorRT for RTX has none: targets says what engines run on",
        "strip_plan": "TensorRT for RTX strips and fills engines on a GPU alone; profile_per_bucket saves the space",
        "refit": "TensorRT for RTX fills engines with other weights on a GPU alone",
        "build_route": "TensorRT for RTX ignores it",
    }
    """Keys of TensorRT's table that make no sense here -> why."""

    targets: tuple[Literal["8.0", "8.6", "8.9", "12.0", "12.1"], ...] = ()
    profile_per_bucket: bool = True
    tf32: bool = True
    kernel_specialization: Literal["eager", "lazy", "none"] = "eager"
    cuda_graph: Literal["step", "loop", "off"] = "step"


BackendOptions = OnnxRuntimeOptions | OnnxRuntimeCudaOptions | OpenVinoOptions | TensorRtOptions | TensorRtRtxOptions
"""The table of one backend in a recipe."""
