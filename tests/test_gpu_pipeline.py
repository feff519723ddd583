"""The whole way on the pretended TensorRT and GPU: each family is built and drawn as ONNX Runtime draws it.

The pretended GPU runs nothing before it is waited for, so that a wait too few shows in the picture.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

import toolchain
from tests.parity import LEAST_PSNR_DB, psnr_db, random_images
from tests.pretend import pretended
from tests.tiny import make_sd
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import make_sd3
from tests.tiny_sdxl import make_sdxl
from toolchain.bundle.bundle import read_bundle
from toolchain.cli.main import cli
from toolchain.runtime import pipeline, start
from toolchain.runtime.pipeline import Pipeline
from toolchain.trace.record import trace

MODELS: dict[str, Callable[[Path], Path]] = {"sd": make_sd, "sdxl": make_sdxl, "sd3": make_sd3, "flux": make_flux}
# Between them: another batch, another size, and a size at which SD3 takes all of its positions.
BUCKETS = {
    "sd": ["1x64x64", "1x64x96"],
    "sdxl": ["1x64x64", "2x64x96"],
    "sd3": ["1x64x64", "1x96x128"],
    "flux": ["1x64x64", "2x64x64"],
}
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


@contextlib.contextmanager
def warnings_of(name: str) -> Iterator[list[str]]:
    """What a logger warns of meanwhile."""
    told: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger(name).addHandler(handler)
    try:
        yield told
    finally:
        logging.getLogger(name).removeHandler(handler)


@pytest.fixture(scope="module", params=MODELS)
def both(
    request: pytest.FixtureRequest, store: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[str, Path, dict[str, np.ndarray]]]:
    """Family, bundle of TensorRT engines, and ONNX Runtime's pictures of every request. The GPU is pretended."""
    family: str = request.param
    folder = tmp_path_factory.mktemp(family)
    model = MODELS[family](folder / "model")
    own = {"family": family, "guided": "false" if family == "flux" else "true"}
    host = BUCKETS[family][: 2 if family == "sd" else 1]
    for backend, buckets in (("onnxruntime", host), ("tensorrt", BUCKETS[family])):
        text = RECIPE.format(backend=backend, buckets=json.dumps(buckets), **own)
        (folder / f"{backend}.toml").write_text(text)
    (folder / "profiles.toml").write_text(f"{text}\n[tensorrt]\nprofile_per_bucket = true\n")
    toolchain.build(folder / "onnxruntime.toml", str(model), folder / "host", store=store)
    pipe = toolchain.load(folder / "host")
    expected = {name: drawn(pipe, **options) for name, options in requests(family).items()}
    pipe.close()
    with pretended(DIFFBUILD_CACHE=str(folder / "cache")) as trt, warnings_of("toolchain") as told:
        for name, output in (("tensorrt", "bundle"), ("profiles", "profiles")):
            command("build", folder / f"{name}.toml", "--model", model, "--store", store, "--output", folder / output)
        assert told == []  # of nodes that TensorRT's parser may refuse, above all
        yield family, folder / "bundle", expected
        assert trt.violations == []


def command(*arguments: object) -> str:
    """What a command of the command line says; it must succeed."""
    done = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_the_command_line(both: tuple[str, Path, dict[str, np.ndarray]], store: Path, tmp_path: Path) -> None:
    """From the plan of what was built to the picture; the build itself is the fixture's."""
    family, bundle, expected = both
    folder = bundle.parent
    said = command("plan", folder / "profiles.toml", "--model", folder / "model", "--store", store)
    assert "engines by tensorrt for kind cuda, name NVIDIA H200, compute capability 9.0" in said
    assert " 0 misses" in said
    sizes = json.loads(command("inspect", folder / "profiles", "--json"))["components"]["denoiser"]["bytes"]
    assert sizes.keys() == {"profiles"}  # whose plan holds the weights
    picture, timeline = tmp_path / "picture.png", tmp_path / "trace.json"
    command("generate", bundle, PROMPT, "--seed", 3, "--output", picture)
    drawn_now = np.asarray(Image.open(picture))[None]
    assert psnr_db(drawn_now, expected["a picture"]) >= LEAST_PSNR_DB
    command("trace", bundle, "--steps", 2, "--output", timeline)
    assert json.loads(timeline.read_text())["traceEvents"]
    if family == "sd":
        said = command("check", folder / "profiles", "--model", folder / "model")
        assert "passed" in said


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
        before = dataclasses.replace(counters)
        pipe(PROMPT, seed=4, **requests(family)["a picture as the start"])
        assert counters.synchronisations - before.synchronisations == 1
        pipe.close()


class Evaluations(toolchain.Observer):
    """Counts them."""

    count = 0

    @contextlib.contextmanager
    def evaluation(self, index: int, total: int, timestep: float) -> Iterator[None]:
        yield
        self.count += 1


def test_an_observer_does_not_wait_for_the_gpu(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    """It sees every evaluation, although the recipe wants a run as one launch."""
    family, bundle, expected = both
    watching = Evaluations()
    pipe = Pipeline(opened_as(bundle, "loop"), observer=watching)
    assert psnr_db(drawn(pipe, **requests(family)["a picture"]), expected["a picture"]) >= LEAST_PSNR_DB
    counters, watching.count = pipe._memory.counters, 0
    before = dataclasses.replace(counters)
    pipe(PROMPT, seed=4, steps=3)
    assert watching.count == evaluated(family, 3)
    assert counters.launches - before.launches == watching.count + 1  # and the decoder
    assert counters.synchronisations - before.synchronisations == 1
    pipe.close()


@pytest.mark.parametrize("cuda_graph", ["step", "loop"])
def test_a_table_longer_than_the_step_has_rows(
    both: tuple[str, Path, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch, cuda_graph: str
) -> None:
    """Written part by part between launches, also where one launch runs all steps of a part."""
    _, bundle, _ = both
    pipe = opened(bundle, cuda_graph)
    whole = pipe(PROMPT, seed=3, steps=4, decode=False).latents
    for module in (start, pipeline):
        monkeypatch.setattr(module, "MAX_EVALUATIONS", 2)
    assert np.array_equal(pipe(PROMPT, seed=3, steps=4, decode=False).latents, whole)
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


def test_buckets_that_share_an_engine_draw_as_with_their_own(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    _, bundle, _ = both
    own, shared = opened(bundle, "loop"), opened(bundle.parent / "profiles", "loop")
    for bucket in own.bundle.buckets:
        prompts = [PROMPT, "a blue square"][: bucket.batch]
        options: dict[str, Any] = {"seed": 3, "size": (bucket.height, bucket.width)}
        first, second = (pipe(prompts, **options).latents for pipe in (own, shared))
        np.testing.assert_array_equal(first, second)
    folders = {entry.folder for entry in shared.bundle.engines["denoiser"].values()}
    assert folders == {"engines/denoiser/profiles"}
    assert sorted(plan.folder.name for plan in shared._memory._plans.values() if plan.profiles > 1) == ["profiles"] * 3
    own.close()
    shared.close()
    from cuda.bindings import runtime

    assert runtime._VIOLATIONS == []
    assert runtime._live() == []


def test_a_shared_engine_stays_open_when_a_bucket_gives_way(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, _ = both
    if family != "sd":
        pytest.skip("the runtime is the same for every family: one is enough")
    pipe = Pipeline(opened_as(bundle.parent / "profiles", "loop"), open_buckets=1)
    held, plans = [], []
    for _ in range(3):
        for size in ((64, 64), (64, 96)):
            drawn(pipe, size=size)
        held.append(_bytes(pipe))
        plans.append({id(plan) for plan in pipe._memory._plans.values() if plan.profiles > 1})
    assert held[0] == held[1] == held[2]
    assert plans[0] == plans[1] == plans[2]
    pipe.close()


def _bytes(pipe: Pipeline) -> tuple[int, int]:
    return pipe._memory.counters.device_bytes, pipe._memory.counters.pinned_bytes


def test_a_trace_of_a_shared_engine_names_the_bucket(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, _ = both
    if family != "sd":
        pytest.skip("the runtime is the same for every family: one is enough")
    traced = trace(opened_as(bundle.parent / "profiles", "step"), {"prompt": PROMPT, "steps": 2, "size": (64, 96)})
    named = {span.name for span in traced.of("engine")}
    assert {"denoiser 1x64x96", "vae_decoder 1x64x96"} <= named
    assert not any("64x64" in name for name in named)


def test_a_trace_has_the_times_of_the_stream(both: tuple[str, Path, dict[str, np.ndarray]]) -> None:
    family, bundle, _ = both
    traced = trace(opened_as(bundle, "loop"), {"prompt": PROMPT, "seed": 3, "steps": 4})
    engines = [span.name.split()[0] for span in traced.of("engine")]
    # Although the recipe wants a run as one launch.
    assert len(traced.of("step")) == engines.count("denoiser") == evaluated(family, 4)
    assert [f"launch {span.name}" for span in traced.of("engine")] == [span.name for span in traced.of("launch")]
    assert {span.track for span in traced.of("stage")} == {"pipeline", "host"}  # tokenizing is the host's
    assert all(span.ms >= 0 for span in traced.spans)
