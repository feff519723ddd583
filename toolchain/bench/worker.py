"""The inside of a contender: `python -m toolchain.bench.worker NAME BUNDLE MODEL PICTURE`.

BUNDLE is the one that is measured, or for OpenVINO the one that stands against it; MODEL is the diffusers folder.
Reads one workload per line, draws it, and answers with milliseconds by stage; null ends it. The first answer is the
cold start by part.
"""

from __future__ import annotations

import time

BEGAN = time.time()  # before anything else is imported

import copy  # noqa: E402
import json  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

Stages = dict[str, float]
Draw = Callable[[dict[str, Any]], tuple[Stages, Any]]


class Parts:
    """Milliseconds of consecutive parts of the cold start.

    spent       part -> milliseconds
    base_bytes  resident memory before engines were opened, where it was measured
    gpu_mb      returns what was allocated on the GPU since `watch_gpu`, by any process
    """

    def __init__(self) -> None:
        self.spent: Stages = {}
        self.base_bytes: int | None = None
        self.gpu_mb: Callable[[], float | None] = lambda: None
        self._last = time.perf_counter()

    def watch_gpu(self, free_bytes: Callable[[], int]) -> None:
        """From now on `gpu_mb` compares the GPU's free memory with what is free now."""
        base = free_bytes()
        self.gpu_mb = lambda: (base - free_bytes()) / 1e6

    def done(self, name: str) -> None:
        """Ends a part: its time is that since the last one."""
        now = time.perf_counter()
        self.spent[name] = self.spent.get(name, 0.0) + (now - self._last) * 1e3
        self._last = now


def diffbuild(bundle: str, _: str, parts: Parts) -> Draw:
    """The runtime."""
    from toolchain.bundle.bundle import read_bundle
    from toolchain.bundle.signing import admit
    from toolchain.runtime.engines import usable_backend
    from toolchain.runtime.pipeline import Pipeline

    parts.done("imports_ms")
    opened = read_bundle(Path(bundle))
    parts.done("manifest_ms")
    opened = admit(opened)
    parts.done("verify_ms")
    usable_backend(opened)  # imports the backend's library, whose memory is none of the engines'
    parts.base_bytes = resident_bytes()[0]
    on_host = opened.device["kind"] == "cpu"  # elsewhere a launch returns before the work is done
    if not on_host:
        from toolchain.cuda.driver import free_memory_bytes

        parts.watch_gpu(free_memory_bytes)
    # A GPU may not hold every bucket: there the first picture opens what it needs.
    batches = len({bucket.batch for bucket in opened.buckets})
    pipe = Pipeline(opened, warm_up=False, open_buckets=None if on_host else batches)
    if on_host:
        pipe.warm_up()
    parts.done("open_and_warm_up_ms")

    def draw(work: dict[str, Any]) -> tuple[Stages, Any]:
        pipe.forget_prompts()  # a service sees new prompts
        result = pipe(
            [work["prompt"]] * work["batch"],
            seed=work["seed"],
            steps=work["steps"],
            scheduler=work["scheduler"],
            guidance=work["guidance"],
            size=tuple(work["size"]),
        )
        t = result.timings
        loop_ms = t.launch_ms if on_host else t.denoise_ms
        stages = {
            "tokenize_ms": t.tokenize_ms,
            "text_ms": t.text_ms - t.tokenize_ms,
            "denoise_ms": loop_ms,
            "decode_ms": t.decode_ms,
            "overhead_ms": t.total_ms - t.text_ms - loop_ms - t.decode_ms,
            "total_ms": t.total_ms,
            **({"loop_overhead_ms": t.denoise_ms - t.launch_ms} if on_host else {"host_loop_ms": t.launch_ms}),
            "evaluations": float(len(t.steps_ms)),
            "launches": float(t.launches),
        }
        return stages, result.images[0]

    return draw


def diffusers(bundle: str, model: str, parts: Parts, compiled: bool = False) -> Draw:
    """The diffusers pipeline, in eager mode or `compiled` by torch.compile."""
    # diffusers imports a part when it is named: without this one its imports would count as loading.
    import diffusers.pipelines.pipeline_utils  # noqa: F401
    import torch

    from toolchain.bundle.bundle import read_bundle
    from toolchain.check.reference import reference_pipeline, reference_scheduler, text_length
    from toolchain.models.hub import resolve_model
    from toolchain.models.registry import family_of
    from toolchain.sampler.schedulers import parse, reference_kwargs
    from toolchain.sampler.silence import quiet

    parts.done("imports_ms")
    opened, source = read_bundle(Path(bundle)), resolve_model(model)
    recipe = opened.recipe
    family = family_of(source, recipe)
    pipeline, _ = reference_pipeline(source, family, recipe)
    on_gpu, dtype = opened.device["kind"] == "cuda", recipe.component("denoiser").dtype
    if on_gpu:
        parts.watch_gpu(lambda: int(torch.cuda.mem_get_info()[0]))
        pipeline.to("cuda", getattr(torch, dtype))
    elif dtype == "bfloat16":  # torch's float16 on a CPU is slower than its float32
        pipeline.to(torch.bfloat16)
    wait = torch.cuda.synchronize if on_gpu else lambda: None
    network = "unet" if hasattr(pipeline, "unet") else "transformer"
    if compiled:
        setattr(pipeline, network, torch.compile(getattr(pipeline, network)))
        pipeline.vae.decode = torch.compile(pipeline.vae.decode)
    stages: Stages = {}
    pipeline.encode_prompt = _timed(pipeline.encode_prompt, stages, "text_ms", wait)
    pipeline.vae.decode = _timed(pipeline.vae.decode, stages, "decode_ms", wait)
    loaded, length = pipeline.scheduler, text_length(source, family, recipe)
    parts.done("load_ms")

    def draw(work: dict[str, Any]) -> tuple[Stages, Any]:
        spec = parse(work["scheduler"])
        pipeline.scheduler = copy.deepcopy(reference_scheduler(loaded, spec))  # a trajectory uses a scheduler up
        stages.clear()
        started = time.perf_counter()
        with quiet():
            result = pipeline(
                [work["prompt"]] * work["batch"],
                num_inference_steps=work["steps"],
                guidance_scale=work["guidance"],
                height=work["size"][0],
                width=work["size"][1],
                generator=[torch.Generator().manual_seed(work["seed"] + i) for i in range(work["batch"])],
                **reference_kwargs(spec),
                **length,
            )
        total = (time.perf_counter() - started) * 1e3
        denoise = total - sum(stages.values())
        return {**stages, "denoise_ms": denoise, "total_ms": total}, result.images[0]

    return draw


def _timed(call: Callable[..., Any], stages: Stages, key: str, wait: Callable[[], None]) -> Callable[..., Any]:
    """`call`, whose time is added to `stages`; `wait` waits for work that was only enqueued."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        wait()
        started = time.perf_counter()
        try:
            return call(*args, **kwargs)
        finally:
            wait()
            stages[key] = stages.get(key, 0.0) + (time.perf_counter() - started) * 1e3

    return timed


def compile_(bundle: str, model: str, parts: Parts) -> Draw:
    """The diffusers pipeline with torch.compile."""
    return diffusers(bundle, model, parts, compiled=True)


CONTENDERS: dict[str, Callable[[str, str, Parts], Draw]] = {
    "diffbuild": diffbuild,
    "diffusers": diffusers,
    "compile": compile_,
    "openvino": diffbuild,
}


def resident_bytes() -> tuple[int | None, int | None]:
    """(now, at most so far) of this process, mapped pages included; None where the system does not report it.

    On Linux not `getrusage`, whose peak begins at that of the process that started this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        values = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines if line.startswith("Vm")}
        return values["VmRSS"], values["VmHWM"]
    except (OSError, KeyError):
        pass
    try:
        import resource
    except ImportError:
        return None, None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return None, peak if sys.platform == "darwin" else peak * 1024


def ending(parts: Parts) -> dict[str, float | None]:
    """What is only known at the end: peak memory, and by how much it is above what there was before the engines.

    The latter only where nothing else came on top: to compile a sampler's table, torch is imported.
    """
    peak, base = resident_bytes()[1], parts.base_bytes
    grown = None if peak is None or base is None or "torch" in sys.modules else (peak - base) / 1e6
    return {"peak_mb": None if peak is None else peak / 1e6, "grown_mb": grown}


def main() -> None:
    """Draws what standard input asks for, until null."""
    name, bundle, model, picture = sys.argv[1:5]
    answers, sys.stdout = sys.stdout, sys.stderr  # what libraries print is no answer
    parts = Parts()
    draw = CONTENDERS[name](bundle, model, parts)
    first = json.loads(sys.stdin.readline())
    parts = _resume(parts)
    _, image = draw(first)
    parts.done("first_picture_ms")
    image.save(picture)
    print(json.dumps({"began": BEGAN, "gpu_mb": parts.gpu_mb(), **parts.spent}), file=answers, flush=True)
    for line in sys.stdin:
        work = json.loads(line)
        answer = ending(parts) if work is None else draw(work)[0]
        print(json.dumps(answer), file=answers, flush=True)


def _resume(parts: Parts) -> Parts:
    """The same parts with the clock restarted: waiting for the first workload is not part of the cold start."""
    fresh = Parts()
    fresh.spent, fresh.base_bytes, fresh.gpu_mb = parts.spent, parts.base_bytes, parts.gpu_mb
    return fresh


if __name__ == "__main__":
    main()
