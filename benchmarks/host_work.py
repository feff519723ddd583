"""What the host does per step of the denoising loop on a GPU, measured on a pretended one that does nothing.

    python benchmarks/host_work.py --output benchmarks/results/host_work.json

A bundle of a tiny SD model is built for TensorRT through the stand-ins of tests/fakes, its step captured, and a
launch of a captured graph then returns at once: what remains is the runtime's own Python and the stand-in's checks.
The driver's share of a real launch, some microseconds, is not in it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import toolchain  # noqa: E402
from tests.pretend import pretended  # noqa: E402
from tests.tiny import RECIPE, make_sd  # noqa: E402
from toolchain.engines.machine import installed, machine  # noqa: E402
from toolchain.store.plain_json import encode  # noqa: E402

STEPS = 1000
PACKAGES = ("numpy", "onnxruntime-gpu", "cuda-bindings")
SCHEDULERS = {"the same noise": "euler", "fresh noise in every step": "euler-a"}


def measured(pipe: Any, scheduler: str, repeats: int) -> dict[str, Any]:
    """Microseconds of the host per step, of runs of 1,000 steps."""
    found = []
    denoise = pipe._denoise

    def timed(*args: Any) -> Any:
        started = time.perf_counter()
        result = denoise(*args)
        found.append((time.perf_counter() - started) / STEPS * 1e6)
        return result

    with mock.patch.object(pipe, "_denoise", timed):
        for seed in range(repeats + 1):
            pipe("a red circle", seed=seed, steps=STEPS, scheduler=scheduler, decode=False)
    del found[0]  # which makes the events that the others use again
    return {"us_per_step": statistics.median(found), "rounds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--repeats", type=int, default=9)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, pretended(DIFFBUILD_CACHE=folder):
        scratch = Path(folder)
        model, recipe = make_sd(scratch / "model"), scratch / "tiny.toml"
        recipe.write_text('backend = "tensorrt"\n' + RECIPE)
        toolchain.build(recipe, str(model), scratch / "bundle", store=scratch / "store")
        pipe: Any = toolchain.load(scratch / "bundle")
        from cuda.bindings import runtime

        succeeded = (runtime.cudaError_t.cudaSuccess,)

        def launched(executable: Any, stream: Any) -> Any:  # a Mock's call takes longer than all the rest
            return succeeded

        with mock.patch.object(runtime, "cudaGraphLaunch", launched):
            steps = {name: measured(pipe, scheduler, arguments.repeats) for name, scheduler in SCHEDULERS.items()}
        size = pipe.bundle.buckets[0]
        pipe.close()
    result = {"machine": machine(), "packages": installed(PACKAGES), "bucket": str(size), "steps": steps}
    arguments.output.write_text(encode(result) + "\n")
    for name, figures in steps.items():
        print(f"{name}: {figures['us_per_step']:.1f} microseconds per step")


if __name__ == "__main__":
    main()
