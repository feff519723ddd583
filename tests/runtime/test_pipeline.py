"""The runtime's own behaviour; that its pictures are diffusers' is held by test_parity."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

import toolchain
from tests.parity import Build, least_psnr_db
from toolchain.bundle.bundle import read_bundle
from toolchain.errors import BundleError, RequestError, SamplerError
from toolchain.runtime import pipeline, start
from toolchain.runtime.noise import Generator
from toolchain.runtime.tables import load_table
from toolchain.sampler.compile import compile_table

PROMPT = "a red circle on a white background"


@pytest.fixture(scope="module")
def pipe(tiny_bundle: Path) -> toolchain.Pipeline:
    return toolchain.load(tiny_bundle)


def pixels(result: toolchain.Result) -> np.ndarray:
    return np.stack([np.asarray(image) for image in result.images])


def test_same_seed_same_picture_whatever_ran_before(pipe: toolchain.Pipeline) -> None:
    first = pixels(pipe(PROMPT, seed=7))
    pipe("a blue square", seed=1, scheduler="euler-a", guidance=2.0, steps=4, size=(64, 96))
    assert np.array_equal(pixels(pipe(PROMPT, seed=7)), first)
    assert not np.array_equal(pixels(pipe(PROMPT, seed=8)), first)


def test_a_picture_does_not_depend_on_its_place_in_a_batch(pipe: toolchain.Pipeline) -> None:
    alone = pixels(pipe("a blue square", seed=5, size=(64, 96)))[0]
    together = pixels(pipe([PROMPT, "a blue square", PROMPT], seed=[1, 5, 2], size=(64, 96)))
    assert together.shape == (3, 64, 96, 3)
    assert np.abs(together[1].astype(int) - alone.astype(int)).max() <= 1


def test_one_open_bucket_draws_what_all_of_them_draw(pipe: toolchain.Pipeline, tiny_bundle: Path) -> None:
    lean = toolchain.load(tiny_bundle, open_buckets=1)
    for size in ((64, 64), (64, 96), (64, 64)):
        expected = pixels(pipe(PROMPT, seed=7, size=size))
        assert np.array_equal(pixels(lean(PROMPT, seed=7, size=size)), expected)
        assert [(b.height, b.width) for b in lean._buckets] == [size]
    lean.close()


@pytest.mark.parametrize("threads", [2, 3])
def test_several_threads_draw_what_one_draws(threads: int, build: Build, tiny_model: Path, tiny_recipe: Path) -> None:
    """As many as the recipe says, whatever the cores of the process."""
    pictures, counts = [], []
    for number in (1, threads):
        text = f"{tiny_recipe.read_text()}\n[onnxruntime]\nthreads = {number}\n"
        pipe = build("threads", tiny_model, text)
        pictures.append(pixels(pipe(PROMPT, seed=7)))
        counts.append(running_threads())
        pipe.close()
    assert least_psnr_db(*pictures) >= 60  # type: ignore[arg-type]
    if sys.platform == "linux":
        assert counts[1] - counts[0] >= threads - 1


def running_threads() -> int:
    """Of this process, those of the engines included; 0 where the system does not tell."""
    tasks = Path("/proc/self/task")
    return len(list(tasks.iterdir())) if tasks.is_dir() else 0


def test_no_open_bucket_is_too_few(tiny_bundle: Path) -> None:
    with pytest.raises(RequestError, match="too few buckets") as error:
        toolchain.load(tiny_bundle, open_buckets=0)
    assert "1 or more" in str(error.value)


def test_one_seed_counts_up_and_none_is_drawn_at_random(pipe: toolchain.Pipeline) -> None:
    assert pipe([PROMPT, PROMPT], seed=10, steps=1).seeds == [10, 11]
    assert pipe(PROMPT, steps=1).seeds != pipe(PROMPT, steps=1).seeds


def test_latents_in_replace_the_seed(pipe: toolchain.Pipeline) -> None:
    noise = Generator(3).randn((1, 4, 8, 8))
    assert np.array_equal(pixels(pipe(PROMPT, seed=0, latents=noise)), pixels(pipe(PROMPT, seed=3)))


def test_latents_out_without_decoding(pipe: toolchain.Pipeline) -> None:
    result = pipe([PROMPT, PROMPT], seed=0, decode=False)
    assert result.images == []
    assert result.latents.shape == (2, 4, 8, 8)
    assert np.array_equal(result.latents, pipe([PROMPT, PROMPT], seed=0).latents)


def test_the_callback_sees_every_evaluation_and_can_stop(pipe: toolchain.Pipeline) -> None:
    seen: list[tuple[int, int, float]] = []

    def watch(progress: toolchain.Progress) -> bool:
        assert progress.latents.shape == (1, 4, 8, 8)
        seen.append((progress.index, progress.total, progress.timestep))
        return progress.index < 2

    stopped = pipe(PROMPT, seed=0, steps=4, scheduler="euler", callback=watch)
    assert [index for index, _, _ in seen] == [0, 1, 2]
    assert {total for _, total, _ in seen} == {4}
    assert seen[0][2] > seen[1][2] > seen[2][2]
    assert len(stopped.images) == 1


def test_crop_takes_the_middle_of_the_nearest_larger_bucket(pipe: toolchain.Pipeline) -> None:
    whole = pixels(pipe(PROMPT, seed=0, size=(64, 96)))[0]
    cut = pixels(pipe(PROMPT, seed=0, size=(48, 80), crop=True))[0]
    assert np.array_equal(cut, whole[8:56, 8:88])


def test_prompts_are_encoded_once(pipe: toolchain.Pipeline) -> None:
    before = pipe._texts.launches
    pipe("a prompt that nobody gave before", seed=0, steps=1)
    pipe(["a prompt that nobody gave before"] * 2, seed=0, steps=1)
    assert pipe._texts.launches == before + 1


def test_the_cache_of_prompts_stops_growing(pipe: toolchain.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    (encoder,) = pipe._texts._encoders.values()
    pipe.forget_prompts()
    monkeypatch.setattr(encoder, "_capacity", 3)
    first = pipe("a red circle", seed=0, steps=1)
    rows = len(encoder._known) + len(encoder._free)
    for i in range(9):
        pipe(f"prompt {i}", seed=0, steps=1)
    assert len(encoder._known) == 3
    assert len(encoder._known) + len(encoder._free) <= max(rows, 3)
    # A row that was taken over by another prompt must not be seen again.
    assert np.array_equal(first.latents, pipe("a red circle", seed=0, steps=1).latents)


def test_a_table_that_is_not_in_the_bundle_is_compiled(pipe: toolchain.Pipeline) -> None:
    assert "ddim/6" not in pipe.bundle.samplers
    assert pipe.table("ddim", 6, (64, 64)).evaluations == 6


def test_compiling_a_table_is_told_and_timed(pipe: toolchain.Pipeline) -> None:
    class Watch:
        told: ClassVar[list[str]] = []

        def __call__(self, progress: toolchain.Progress) -> None:
            self.told.append(f"evaluation {progress.index}")

        def stage(self, text: str) -> None:
            self.told.append(text)

    for wanted in (["compiling the sampler table ddim/2"], []):
        Watch.told.clear()
        timings = pipe(PROMPT, seed=0, scheduler="ddim", steps=2, callback=Watch()).timings
        assert Watch.told == [*wanted, "evaluation 0", "evaluation 1"]
        assert (timings.table_ms > 0) == bool(wanted)
        assert timings.table_ms + timings.text_ms + timings.denoise_ms + timings.decode_ms <= timings.total_ms
    assert pipe(PROMPT, seed=0, scheduler="euler", steps=4).timings.table_ms == 0


def test_what_a_scheduler_cannot_do_of_a_range_is_refused_with_the_reason(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle = dataclasses.replace(read_bundle(tiny_bundle), path=tmp_path, samplers={"lcm/51": "lcm.json"})
    (tmp_path / "lcm.json").write_text('{"lcm/51": "diffusers refuses lcm with 51 steps"}')
    with pytest.raises(SamplerError, match="refuses lcm with 51 steps"):
        load_table(bundle, "lcm/51")
    for damage in ("{}", "[]", "{"):
        (tmp_path / "lcm.json").write_text(damage)
        with pytest.raises(BundleError, match="a sampler table"):
            load_table(bundle, "lcm/51")


@pytest.mark.parametrize("scheduler", ["euler", "euler-a", "heun"])
def test_a_table_longer_than_the_step_has_rows_is_written_part_by_part(
    pipe: toolchain.Pipeline, monkeypatch: pytest.MonkeyPatch, scheduler: str
) -> None:
    for steps in (4, 9):
        whole = pipe(PROMPT, seed=0, steps=steps, scheduler=scheduler, decode=False)
        with monkeypatch.context() as patched:
            patched.setattr(start, "MAX_EVALUATIONS", 4)
            patched.setattr(pipeline, "MAX_EVALUATIONS", 4)
            parts = pipe(PROMPT, seed=0, steps=steps, scheduler=scheduler, decode=False)
        assert np.array_equal(parts.latents, whole.latents)


def test_a_bundle_without_room_for_a_table_says_so(pipe: toolchain.Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    clamping = compile_table("ddim", 3, {**pipe.bundle.settings.scheduler, "clip_sample": True})
    monkeypatch.setitem(pipe._tables._known, "ddim/3", clamping)
    with pytest.raises(RequestError, match="clamps its estimate") as error:
        pipe(PROMPT, scheduler="ddim", steps=3)
    assert "build the bundle again" in str(error.value)


def test_the_result_tells_what_ran(pipe: toolchain.Pipeline) -> None:
    ran = pipe(PROMPT, seed=0, steps=4, scheduler="euler", guidance=0.3).request
    assert (ran.prompts, ran.negatives, ran.seeds) == ([PROMPT], [""], [0])
    assert (ran.scheduler, ran.steps, ran.guidance) == ("euler", 4, 1.0)


def test_timings_add_up(pipe: toolchain.Pipeline) -> None:
    timings = pipe(PROMPT, seed=0, steps=4, scheduler="euler").timings
    assert len(timings.steps_ms) == 4
    assert sum(timings.steps_ms) <= timings.denoise_ms
    assert timings.text_ms + timings.denoise_ms + timings.decode_ms <= timings.total_ms


BAD_REQUESTS = [
    ({"prompt": 3}, "prompt is not text"),
    ({"prompt": ["a", None]}, "prompt is not text"),
    ({"prompt": []}, "empty list"),
    ({"prompt": [PROMPT, PROMPT], "negative_prompt": ["a", "b", "c"]}, "negative prompts"),
    ({"steps": 0}, "steps"),
    ({"steps": 1.5}, "steps"),
    ({"steps": True}, "steps"),
    ({"steps": 5000}, "steps"),
    ({"seed": -1}, "seed"),
    ({"seed": 2**64}, "seed"),
    ({"seed": "1"}, "seed"),
    ({"seed": True}, "seed"),
    ({"seed": [1, 2]}, "as many seeds"),
    ({"guidance": float("nan")}, "guidance"),
    ({"guidance": "5"}, "guidance"),
    ({"size": (512, 512)}, "1x64x64, 2x64x96"),
    ({"size": (512, 512), "crop": True}, "1x64x64, 2x64x96"),
    ({"size": "64x64"}, "size is not a size"),
    ({"size": (60, 64)}, "--crop"),
    ({"scheduler": "eulr"}, "euler"),
    ({"scheduler": 3}, "scheduler is not a name"),
    ({"latents": np.zeros((1, 4, 4, 4), np.float32)}, "another shape"),
    ({"latents": np.zeros((1, 4, 8, 8))}, "float32"),
    ({"latents": np.full((1, 4, 8, 8), np.nan, np.float32)}, "finite"),
]


@pytest.mark.parametrize(("request_", "message"), BAD_REQUESTS)
def test_bad_requests(pipe: toolchain.Pipeline, request_: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError) as error:
        pipe(**{"prompt": PROMPT, **request_})  # type: ignore[arg-type]
    assert message in str(error.value)


def test_the_runtime_needs_no_build_dependency(tiny_bundle: Path) -> None:
    """A picture is drawn in a process in which importing any of the build's libraries fails."""
    code = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {{"torch", "diffusers", "transformers", "onnx", "onnx_ir", "onnxscript", "polygraphy",
                                   "safetensors", "huggingface_hub", "scipy", "skimage", "click", "rich"}}:
            raise ImportError(name + " must not be imported")
sys.meta_path.insert(0, Refuse())
import toolchain
result = toolchain.load({str(tiny_bundle)!r})("a red circle", seed=0)
print(result.images[0].size)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "(64, 64)"


@pytest.mark.parametrize("asked", [None, "0"])
def test_nothing_is_reported_to_anybody_unless_the_user_wants_it(
    tiny_bundle: Path, tmp_path: Path, asked: str | None
) -> None:
    """ONNX Runtime would: what it leaves in the user's home says whether it does."""
    code = f"import toolchain; toolchain.load({str(tiny_bundle)!r})('a red circle', seed=0)"
    # On a CI system it reports nothing of its own accord.
    unset = ("ORT_DISABLE_TELEMETRY", "CI", "XDG_CACHE_HOME")
    given = {name: value for name, value in os.environ.items() if name not in unset} | {"HOME": str(tmp_path)}
    given |= {} if asked is None else {"ORT_DISABLE_TELEMETRY": asked}
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    reports = [path.name for path in tmp_path.rglob("*") if "onnxruntime" in str(path.relative_to(tmp_path))]
    assert bool(reports) == (asked == "0")


def test_a_home_that_cannot_be_written_is_no_news(tiny_bundle: Path, tmp_path: Path) -> None:
    code = f"import toolchain; toolchain.load({str(tiny_bundle)!r})('a red circle', seed=0)"
    given = {name: value for name, value in os.environ.items() if name != "XDG_CACHE_HOME"}
    home = tmp_path / "file" / "home"
    home.parent.touch()  # not even the superuser makes a folder in a file
    done = subprocess.run(
        [sys.executable, "-c", code], env=given | {"HOME": str(home)}, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_without_diffusers_a_missing_table_is_a_clear_error(
    pipe: toolchain.Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(RequestError) as error:
        pipe(PROMPT, scheduler="ddim", steps=11)
    assert "euler/4" in str(error.value)
    assert "diffbuild[build]" in str(error.value)
