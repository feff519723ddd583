"""Calibration on the trajectory: ranges are those of diffusers' own pictures, and nothing is drawn twice."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.families import MAKERS
from tests.parity import diffusers_pipeline
from tests.pretend import pretended
from tests.test_cli import run, run_json
from tests.tiny import make_sd
from toolchain.builder import calibration
from toolchain.builder.calibration import CALIBRATED
from toolchain.builder.open_model import open_model
from toolchain.builder.plan import Plan, execute, plan_calibration
from toolchain.builder.stages.calibration import RANGES
from toolchain.builder.stages.graph import GRAPH
from toolchain.builder.steps import StepId
from toolchain.engines.runners import runner_of
from toolchain.errors import EngineError, RecipeError
from toolchain.precision.watch import watched
from toolchain.recipe import Calibration, Quantize, Recipe, parse_recipe
from toolchain.store.artifacts import Artifact, Store
from toolchain.weights.range_file import RangeFile, read_ranges

PROMPTS = ("a red circle on a white background", "a blue square", "a")
STEPS = 3
RECIPE = f"""
family = "FAMILY"
buckets = ["1x64x64", "2x64x96"]
[sampling]
scheduler = "SCHEDULER"
steps = {STEPS}
guidance = 5.0
[calibration]
prompts = {[*PROMPTS]}
seeds = [7]
[check]
prompts = ["a"]
"""


def recipe_of(family: str = "sd", scheduler: str = "euler", **changes: Any) -> Recipe:
    text = RECIPE.replace("FAMILY", family).replace("SCHEDULER", scheduler)
    return replace(parse_recipe(text, "tiny", "tiny.toml"), **changes)


def plan_of(recipe: Recipe, model: Path, store: Path) -> Plan:
    return plan_calibration(recipe, open_model(str(model), None, store=store), Store(store))


def calibrated(plan: Plan, progress: Callable[..., None] = lambda *_: None) -> Artifact:
    return execute(plan, progress)[plan.steps[-1].id]


def ranges_of(plan: Plan) -> RangeFile:
    return read_ranges(calibrated(plan).file(RANGES))


def seen_by_diffusers(model: Path, names: dict[str, Sequence[str]]) -> dict[str, Any]:
    """Peaks [pictures, steps, channels] of the inputs of modules, from hooks in the real pipeline."""
    import torch

    pipeline = diffusers_pipeline(model, "StableDiffusionPipeline")
    from toolchain.sampler.schedulers import create, parse

    pipeline.scheduler = create(parse("euler"), dict(pipeline.scheduler.config))
    peaks: dict[str, list[np.ndarray]] = {}
    handles = []
    for component, weights in names.items():
        root = {"denoiser": pipeline.unet, "vae_decoder": pipeline.vae}[component]
        for weight in weights:

            def hook(module: Any, given: tuple[Any, ...], weight: str = weight) -> None:
                x = given[0].detach().abs()
                axis = 1 if isinstance(module, torch.nn.Conv2d) else x.ndim - 1
                peaks.setdefault(weight, []).append(x.amax([i for i in range(x.ndim) if i != axis]).numpy())

            handles.append(root.get_submodule(weight.removesuffix(".weight")).register_forward_pre_hook(hook))
    for number, prompt in enumerate(PROMPTS):
        generator = torch.Generator().manual_seed(7 + number)
        pipeline([prompt], generator=[generator], num_inference_steps=STEPS, guidance_scale=5.0, height=64, width=64)
    for handle in handles:
        handle.remove()
    return {name: np.stack(found).reshape(len(PROMPTS), -1, found[0].size) for name, found in peaks.items()}


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_ranges_are_those_of_diffusers_own_pictures(tiny_model: Path, store: Path) -> None:
    """Of both rows of the guidance batch, in every step, for every weight: by hooks in the real modules."""
    found = ranges_of(plan_of(recipe_of(), tiny_model, store))
    names = {component: [*ranges] for component, ranges in found.components.items()}
    expected = seen_by_diffusers(tiny_model, names)
    assert len(names["denoiser"]) == 83
    assert len(names["vae_decoder"]) == 31
    for ranges, steps in ((found.components["denoiser"], STEPS), (found.components["vae_decoder"], 1)):
        for name, seen in ranges.items():
            peaks = expected[name]
            assert seen.peaks.shape == (steps, peaks.shape[2])
            np.testing.assert_allclose(seen.peaks, peaks.max(axis=0), rtol=2e-3, atol=2e-4, err_msg=name)
            np.testing.assert_allclose(seen.means, peaks.max(axis=2).mean(axis=0), rtol=2e-3, atol=2e-4, err_msg=name)
            assert seen.largest("percentile=100") <= seen.largest("max")
            assert seen.largest("percentile=99.9") > 0


@pytest.mark.parametrize("family", MAKERS)
def test_every_weight_has_a_range(family: str, store: Path, family_model: Callable[[str], Path]) -> None:
    scheduler = "model" if family in ("sd3", "flux") else "euler"
    plan = plan_of(recipe_of(family, scheduler), family_model(family), store)
    found = ranges_of(plan)
    import onnx_ir as ir

    for component in CALIBRATED:
        graph = plan.artifact(StepId("graph", component, "1x64x64"))
        assert graph is not None
        weights = {name for w in watched(ir.load(graph.file(GRAPH))) for name in w.weights}
        assert found.components[component].keys() == weights
        for name, seen in found.components[component].items():
            assert seen.peaks.any(), name
            assert len(seen.peaks) == (STEPS if component == "denoiser" else 1)
    assert found.about["pictures"] == 3
    assert found.about["guidance"] == 5.0


class Stopped(BaseException):
    pass


def forget(artifact: Artifact) -> bytes:
    """Its ranges; it is gone from its store."""
    data = artifact.file(RANGES).read_bytes()
    shutil.rmtree(artifact.path)
    return data


def test_an_interrupted_calibration_goes_on(tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bytes, and no picture is drawn twice."""
    drawn: list[str] = []
    stop_at = [-1]
    real = calibration.stages.calibration.write

    def interrupted(*args: Any) -> None:
        collectors, count, batch, draw, *others = args

        def stop(first: int) -> None:
            if first == stop_at[0]:
                raise Stopped
            drawn.append(PROMPTS[first])
            draw(first)

        real(collectors, count, batch, stop, *others)

    monkeypatch.setattr(calibration.stages.calibration, "write", interrupted)
    plan = plan_of(recipe_of(calibration=Calibration(PROMPTS, seeds=(21,))), tiny_model, store)
    whole = forget(calibrated(plan))
    assert drawn == [*PROMPTS]
    drawn.clear()
    for stop_at[0] in (0, 1, 2):
        with pytest.raises(Stopped):
            calibrated(plan)
    partial = plan.store.partial(plan.steps[-1].key)
    assert partial.exists()
    stop_at[0] = -1
    again = calibrated(plan)
    assert drawn == [*PROMPTS]
    assert again.file(RANGES).read_bytes() == whole
    assert not partial.exists()
    assert not [p for p in again.path.iterdir() if p.is_dir()]  # nothing is left of the bundle that drew


@pytest.mark.parametrize("damage", [lambda data: data[:-64], lambda data: b"", lambda data: data[:100] + data[101:]])
def test_what_is_left_of_a_damaged_one_is_not_used(
    damage: Callable[[bytes], bytes], tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = Calibration(PROMPTS[:2], seeds=(len(damage(bytes(range(250)))),), steps=1)
    plan = plan_of(recipe_of(calibration=asked), tiny_model, store)
    expected = forget(calibrated(plan))
    real = calibration.stages.calibration._require_finite
    calls = []

    def stop(collectors: Any) -> None:
        calls.append(collectors)
        if len(calls) == 2:
            raise Stopped
        real(collectors)

    monkeypatch.setattr(calibration.stages.calibration, "_require_finite", stop)
    with pytest.raises(Stopped):
        calibrated(plan)
    partial = plan.store.partial(plan.steps[-1].key)
    partial.write_bytes(damage(partial.read_bytes()))
    assert calibrated(plan).file(RANGES).read_bytes() == expected
    assert len(calls) == 4  # both pictures again


def test_a_filesystem_without_links(tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(recipe_of(calibration=Calibration(PROMPTS[:1], seeds=(41,), steps=1)), tiny_model, store)
    linked = forget(calibrated(plan))

    def refuse(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr("os.link", refuse)
    assert calibrated(plan).file(RANGES).read_bytes() == linked


def test_an_old_partial_is_collected(tmp_path: Path) -> None:
    store = Store(tmp_path)
    path = store.partial("0" * 64)
    path.parent.mkdir()
    path.write_bytes(b"state")
    assert store.gc(min_age_s=3600).leftovers == {}
    assert store.gc(min_age_s=0).leftovers == {f".partial/{'0' * 64}": 5}
    assert not path.exists()


def key(recipe: Recipe, model: Path, store: Path) -> str:
    plan = plan_of(recipe, model, store)
    assert plan.steps[-1].id == StepId("calibration", "denoiser and vae_decoder")
    return plan.steps[-1].key


def test_what_decides_the_key(tiny_model: Path, store: Path) -> None:
    """Another exclusion, other weights or another percentile calibrate nothing anew."""
    recipe = recipe_of()
    asked, sampling = recipe.calibration, recipe.sampling
    assert asked is not None
    base = key(recipe, tiny_model, store)

    def with_quantize(**table: Any) -> Recipe:
        denoiser = replace(recipe.component("denoiser"), quantize=Quantize(**table))
        return replace(recipe, components={"denoiser": denoiser})

    same = [
        recipe_of(name="other"),
        with_quantize(weights="int8"),
        with_quantize(weights="int8", exclude=("mid_block",), scales="mse"),
        replace(recipe, check=replace(recipe.check, seeds=(1, 2))),
        replace(recipe, buckets=recipe.buckets[:1]),
        replace(recipe, sampling=replace(sampling, schedulers=("ddim",), step_counts=(4,), strengths=(0.5,))),
        replace(recipe, calibration=replace(asked, scheduler="euler", steps=STEPS)),
    ]
    assert {key(r, tiny_model, store) for r in same} == {base}
    others = [
        replace(recipe, calibration=replace(asked, prompts=PROMPTS[:2])),
        replace(recipe, calibration=replace(asked, seeds=(8,))),
        replace(recipe, calibration=replace(asked, scheduler="ddim")),
        replace(recipe, calibration=replace(asked, steps=STEPS + 1)),
        replace(recipe, sampling=replace(sampling, guidance=4.0)),
        replace(recipe, buckets=recipe.buckets[1:]),
        replace(recipe, classifier_free_guidance=False),
        recipe_of(components={"denoiser": replace(recipe.component("denoiser"), dtype="float16")}),
        recipe_of(components={"text_encoder": replace(recipe.component("denoiser"), dtype="float16")}),
    ]
    assert len({base, *(key(r, tiny_model, store) for r in others)}) == 1 + len(others)


def test_other_weights_calibrate_anew(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    other = make_sd(tmp_path / "other", seed=1)
    assert key(recipe_of(), other, store) != key(recipe_of(), tiny_model, store)


def test_an_unquantised_build_shares_everything_but_the_watched_engines(tiny_model: Path, store: Path) -> None:
    from toolchain.builder.plan import make_plan

    recipe = recipe_of()
    built = {step.key for step in make_plan(recipe, open_model(str(tiny_model), None), Store(store)).steps}
    plan = plan_of(recipe, tiny_model, store)
    own = {step.stage for step in plan.steps if step.key not in built}
    assert own == {"sampler", "watched", "calibration"}


def test_a_batch_draws_several_prompts_at_once(tiny_model: Path, store: Path) -> None:
    """In parts: three prompts are a batch of two, and one whose picture fills the other place as well."""
    recipe = recipe_of()
    two = replace(recipe.buckets[0], batch=2)
    by_two = ranges_of(plan_of(replace(recipe, buckets=(two,)), tiny_model, store)).components
    by_one = ranges_of(plan_of(recipe, tiny_model, store)).components
    for component, ranges in by_one.items():
        for name, seen in ranges.items():
            np.testing.assert_allclose(by_two[component][name].peaks, seen.peaks, rtol=1e-3, atol=1e-4)


def test_seeds_and_prompts_are_all_drawn(tiny_model: Path, store: Path) -> None:
    """The ranges of both seeds are the larger of those of each."""
    asked = Calibration(PROMPTS[:2], steps=1)
    parts = [
        ranges_of(plan_of(recipe_of(calibration=replace(asked, seeds=seeds)), tiny_model, store)).components["denoiser"]
        for seeds in ((3,), (2**64 - 1,), (3, 2**64 - 1))
    ]
    for name, both in parts[2].items():
        np.testing.assert_array_equal(both.peaks, np.maximum(parts[0][name].peaks, parts[1][name].peaks))
        np.testing.assert_array_equal(both.counts, parts[0][name].counts + parts[1][name].counts)


def test_a_gpus_recipe_is_calibrated_on_a_cpu(tiny_model: Path, store: Path) -> None:
    """By ONNX Runtime in float32, where the recipe's own backend cannot run."""
    recipe = recipe_of(backend="tensorrt_rtx")
    bfloat16 = {name: replace(recipe.component(name), dtype="bfloat16") for name in ("denoiser", "vae_decoder")}
    plan = plan_of(replace(recipe, components=bfloat16), tiny_model, store)
    assert plan.backend.name == "onnxruntime"
    assert {plan.recipe.component(name).dtype for name in CALIBRATED} == {"float32"}
    assert plan.steps[-1].key == key(recipe_of(), tiny_model, store)


def test_a_gpu_calibrates_by_itself(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    """On the pretended one, whose launches are captured and whose buffers are the device's."""
    expected = ranges_of(plan_of(recipe_of(), tiny_model, store)).components
    for how in ("step", "loop"):
        recipe = recipe_of(backend="tensorrt")
        recipe = replace(recipe, tensorrt=replace(recipe.tensorrt, cuda_graph=how, tf32=False))
        with pretended(DIFFBUILD_CACHE=str(tmp_path / how)) as trt:
            plan = plan_of(recipe, tiny_model, store)
            assert plan.backend.name == "tensorrt"
            forget(calibrated(plan))  # how engines are launched is in no key
            found = ranges_of(plan)
            assert trt.violations == []
        assert found.about["backend"] == "tensorrt"
        for component, ranges in expected.items():
            for name, seen in ranges.items():
                np.testing.assert_allclose(found.components[component][name].peaks, seen.peaks, rtol=1e-3, atol=1e-4)


def test_without_prompts_nothing_is_calibrated(tiny_model: Path, store: Path) -> None:
    with pytest.raises(RecipeError, match=r"says nothing of what to calibrate with(.|\n)*varied-64"):
        plan_of(recipe_of(calibration=None), tiny_model, store)


def test_a_scheduler_that_cannot_be(tiny_model: Path, store: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibration\.scheduler: no scheduler is called (.|\n)*euler\?"):
        plan_of(recipe_of(calibration=Calibration(PROMPTS, scheduler="eulr")), tiny_model, store)


def test_no_backend(tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(type(runner_of("onnxruntime")), "available", lambda _: "onnxruntime cannot be imported")
    with pytest.raises(EngineError, match=r"no backend can draw(.|\n)*cannot be imported(.|\n)*bring the file"):
        plan_of(recipe_of(), tiny_model, store)


def test_what_overflows_is_an_error(tiny_copy: Path, store: Path) -> None:
    """A float16 decoder whose first convolution is so large that what follows it is infinite."""
    from safetensors.numpy import load_file, save_file

    path = tiny_copy / "vae" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(path)
    tensors["decoder.conv_in.weight"] *= 3e5 / np.abs(tensors["decoder.conv_in.weight"]).max()
    tensors["decoder.conv_in.weight"] = np.clip(tensors["decoder.conv_in.weight"], -6e4, 6e4)
    save_file(tensors, path)
    recipe = recipe_of()
    recipe = replace(recipe, components={"vae_decoder": replace(recipe.component("vae_decoder"), dtype="float16")})
    plan = plan_of(recipe, tiny_copy, store)
    with pytest.raises(EngineError, match=r"infinite or NaN(.|\n)*where: vae_decoder(.|\n)*keep_float32"):
        calibrated(plan)
    assert plan.store.lookup("calibration", plan.steps[-1].key) is None
    assert not plan.store.partial(plan.steps[-1].key).exists()


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe_file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(RECIPE.replace("FAMILY", "sd").replace("SCHEDULER", "euler"))
    return path


def test_the_command_writes_a_file(recipe_file: Path, tiny_model: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranges.safetensors"
    arguments = ["calibrate", recipe_file, "--model", tiny_model, "--store", store, "--output", output]
    said = run(*arguments).stdout.splitlines()
    assert said[0].startswith(f"{output}: ")
    assert said[1:] == [
        "drawn by onnxruntime: 3 pictures, 3 steps of euler, guidance 5, 1x64x64",
        "denoiser: ranges of the inputs of 83 weights, in float32",
        "vae_decoder: ranges of the inputs of 31 weights, in float32",
    ]
    first = output.read_bytes()
    document = run_json(*arguments)
    assert output.read_bytes() == first
    assert document["output"] == str(output)
    assert document["bytes"] == len(first)
    assert document["weights"] == {"denoiser": 83, "vae_decoder": 31}
    assert document["drawn"] == dict(read_ranges(output).about)
    assert document["built"] == 0
    plan = plan_of(replace(parse_recipe(recipe_file.read_text(), "mine", ""), name="mine"), tiny_model, store)
    assert calibrated(plan).file(RANGES).read_bytes() == first


def test_progress_says_how_far_it_is(tiny_model: Path, store: Path) -> None:
    recipe = recipe_of(calibration=Calibration(PROMPTS, seeds=(5, 6), steps=1))
    plan = plan_of(recipe, tiny_model, store)
    told: list[tuple[str, str, float | None]] = []
    execute(plan, lambda *_: None, lambda step, phase, share: told.append((step.stage, phase, share)))
    drawing = [(phase, share) for stage, phase, share in told if stage == "calibration"]
    assert drawing == [("drawing 6 pictures", n / 6) for n in range(6)]


@pytest.mark.parametrize("wrong", ["folder", "missing/ranges.safetensors"])
def test_an_output_that_cannot_be(wrong: str, recipe_file: Path, tiny_model: Path, tmp_path: Path) -> None:
    """Before anything is built."""
    (tmp_path / "folder").mkdir()
    store = tmp_path / "store"
    done = run("calibrate", recipe_file, "--model", tiny_model, "--store", store, "--output", tmp_path / wrong, code=2)
    assert "the output is a folder" in done.output or "the folder of the output is missing" in done.output
    assert not store.exists()


def test_a_recipe_without_prompts(tiny_recipe: Path, tiny_model: Path, store: Path, tmp_path: Path) -> None:
    output = tmp_path / "ranges.safetensors"
    done = run("calibrate", tiny_recipe, "--model", tiny_model, "--store", store, "--output", output, code=2)
    assert "the recipe says nothing of what to calibrate with" in done.output
    assert 'prompts = "varied-64"' in done.output
    assert not output.exists()
