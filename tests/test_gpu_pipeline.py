"""The whole way on the pretended TensorRT and GPU: each family is built and drawn as ONNX Runtime draws it.

The pretended GPU runs nothing before it is waited for, so that a wait too few shows in the picture.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests.parity import LEAST_PSNR_DB, psnr_db, random_images
from tests.pretend import pretended
from tests.tiny import make_sd
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import make_sd3
from tests.tiny_sdxl import make_sdxl
from toolchain.bundle import read_bundle
from toolchain.runtime.pipeline import Pipeline
from toolchain.trace.record import trace

MODELS: dict[str, Callable[[Path], Path]] = {"sd": make_sd, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
STOCHASTIC = {"sd": "euler-a", "sdxl": "euler-a", "sd3": None, "flux": None}
RECIPE = """\
family = "{family}"
backend = "{backend}"
buckets = {buckets}
classifier_free_guidance = {guided}

[sampling]
scheduler = "model"
steps = 3
guidance = 4.0
strengths = [0.7]
step_counts = [3, 4]

[check]
prompts = ["a red circle"]
"""
PROMPT = "a red circle left of a blue square"


def drawn(pipe: Pipeline, **options: Any) -> np.ndarray:
    options = {"seed": 3, **options}
    return np.stack([np.asarray(image) for image in pipe(PROMPT, **options).images])


def requests(family: str) -> dict[str, dict[str, Any]]:
    """By name: options of a call, which either backend answers with the same picture."""
    found: dict[str, dict[str, Any]] = {
        "a picture": {},
        "an even number of steps": {"steps": 4},
        "a picture as the start": {"image": random_images(1, 64, 64)[0], "strength": 0.7},
    }
    if STOCHASTIC[family]:
        found["fresh noise in every step"] = {"scheduler": STOCHASTIC[family], "steps": 4}
    if family == "sd":
        found["another size"] = {"size": (64, 96)}
    return found


@pytest.fixture(scope="module", params=MODELS)
def both(
    request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, dict[str, np.ndarray]]]:
    """Family, bundle of TensorRT engines, and ONNX Runtime's pictures of every request. The GPU is pretended."""
    family: str = request.param
    folder = tmp_path_factory.mktemp(family)
    model = MODELS[family](folder / "model")
    own = {
        "guided": "false" if family == "flux" else "true",
        "buckets": '["1x64x64", "1x64x96"]' if family == "sd" else '["1x64x64"]',
    }
    for backend in ("onnxruntime", "tensorrt"):
        (folder / f"{backend}.toml").write_text(RECIPE.format(family=family, backend=backend, **own))
    toolchain.build(folder / "onnxruntime.toml", str(model), folder / "host", store=store)
    pipe = toolchain.load(folder / "host")
    expected = {name: drawn(pipe, **options) for name, options in requests(family).items()}
    pipe.close()
    with pretended(DIFFBUILD_CACHE=str(folder / "cache")) as trt:
        toolchain.build(folder / "tensorrt.toml", str(model), folder / "bundle", store=store)
        yield family, folder / "bundle", expected
        assert trt.violations == []


def evaluated(family: str, steps: int) -> int:
    """How often the denoiser runs in a picture: the tiny sd has PNDM, which evaluates once more than it has steps."""
    return steps + (family == "sd")


def opened_as(bundle: Path, cuda_graph: str) -> toolchain.Bundle:
    found = read_bundle(bundle)
    options = dataclasses.replace(found.recipe.tensorrt, cuda_graph=cuda_graph)
    return dataclasses.replace(found, recipe=dataclasses.replace(found.recipe, tensorrt=options))


def opened(bundle: Path, cuda_graph: str = "step") -> Pipeline:
    return Pipeline(opened_as(bundle, cuda_graph))


@pytest.mark.parametrize("cuda_graph", ["step", "loop", "off"])
def test_the_gpu_draws_the_same_pictures(both: tuple[str, Path, dict[str, np.ndarray]], cuda_graph: str) -> None:
    family, bundle, expected = both
    pipe = opened(bundle, cuda_graph)
    for name, options in requests(family).items():
        assert psnr_db(drawn(pipe, **options), expected[name]) >= LEAST_PSNR_DB, name
    pipe.close()
    from cuda.bindings import runtime

    assert runtime._VIOLATIONS == []
    assert runtime._live() == []


def test_a_picture_waits_for_the_gpu_once(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, _ = both
    evaluations = evaluated(family, 3)
    for cuda_graph, launches in (("step", evaluations), ("loop", 1 + evaluations % 2)):
        pipe = opened(bundle, cuda_graph)
        counters = pipe._memory.counters
        drawn(pipe)
        before = dataclasses.replace(counters)
        result = pipe(PROMPT, seed=4, steps=3)
        assert counters.synchronisations - before.synchronisations == 1
        # The prompt is known: the steps, or an even number of them and one more, and the decoder.
        assert counters.launches - before.launches == launches + 1
        assert result.timings.total_ms > 0
        pipe.close()


def test_a_callback_sees_each_step(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, _ = both
    pipe = opened(bundle)
    seen: list[np.ndarray] = []
    result = pipe(PROMPT, seed=3, steps=4, callback=lambda progress: seen.append(progress.latents))
    assert len(seen) == evaluated(family, 4)
    assert all(not np.array_equal(a, b) for a, b in itertools.pairwise(seen))
    np.testing.assert_array_equal(seen[-1], result.latents)
    pipe.close()


def test_nothing_grows_over_a_thousand_pictures(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, _ = both
    if family != "sd":
        pytest.skip("the runtime is the same for every family: one is enough")
    pipe = opened(bundle)
    held = []
    for index in range(1000):
        pipe(
            f"prompt {index % 300}",  # more than are kept
            seed=index,
            steps=1 + index % 2,
            scheduler=("euler-a", "model")[index % 2],
            size=((64, 64), (64, 96))[index // 2 % 2],
            decode=False,
        )
        held.append((pipe._memory.counters.captures, *_bytes(pipe), len(pipe._tables)))
    assert held[299] == held[-1]
    pipe.close()


def test_a_bucket_that_gives_way_leaves_nothing_behind(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, expected = both
    if family != "sd":
        pytest.skip("the one model here with two buckets")
    pipe = Pipeline(opened_as(bundle, "loop"), open_buckets=1)
    held = []
    for _ in range(3):
        assert psnr_db(drawn(pipe), expected["a picture"]) >= LEAST_PSNR_DB
        assert psnr_db(drawn(pipe, size=(64, 96)), expected["another size"]) >= LEAST_PSNR_DB
        held.append(_bytes(pipe))
    assert held[0] == held[1] == held[2]
    pipe.close()
    from cuda.bindings import runtime

    assert runtime._VIOLATIONS == []
    assert runtime._live() == []


def _bytes(pipe: Pipeline) -> tuple[int, int]:
    return pipe._memory.counters.device_bytes, pipe._memory.counters.pinned_bytes


def test_a_trace_has_the_times_of_the_stream(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, _ = both
    traced = trace(opened_as(bundle, "loop"), {"prompt": PROMPT, "seed": 3, "steps": 4})
    engines = [span.name.split()[0] for span in traced.of("engine")]
    # Although the recipe wants a run as one launch.
    assert len(traced.of("step")) == engines.count("denoiser") == evaluated(family, 4)
    assert [f"launch {span.name}" for span in traced.of("engine")] == [span.name for span in traced.of("launch")]
    assert {span.track for span in traced.of("stage")} == {"pipeline", "host"}  # tokenizing is the host's
    assert all(span.ms >= 0 for span in traced.spans)
