"""What a plan says before anything is built: what changed, what rebuilds nothing, and what is wrong."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toolchain
from tests.pretend import pretended
from tests.sampler.scheduler_configs import FLOW
from tests.test_plan import built, own_store, write
from tests.tiny import RECIPE
from toolchain.builder.plan import Plan
from toolchain.builder.steps import StepId
from toolchain.cli.build import plan_json, plan_lines
from toolchain.errors import RecipeError

__all__ = ["built", "own_store"]
Edit = Callable[[dict[str, Any]], None]


def plan(model: Path | str, store: Path | str, folder: Path, text: str, name: str = "tiny") -> Plan:
    return toolchain.plan_build(write(folder / f"{name}.toml", text), str(model), store=Path(store))


def keys(made: Plan) -> dict[str, str]:
    return {step.name: step.key for step in made.steps}


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def own(component: str, **values: Any) -> str:
    lines = "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())
    return f"{RECIPE}\n[components.{component}]\n{lines}"


# --- keys -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (RECIPE, own("text_encoder", tokens=24)),
        (RECIPE, own("denoiser", tokens=3)),
        (RECIPE, own("denoiser", keep_float32=["conv_in"])),
        (RECIPE, own("text_encoder", dtype="float32", keep_float32=["*"])),
        (
            own("denoiser", dtype="float16", keep_float32=["conv_in", "conv_out"]),
            own("denoiser", dtype="float16", keep_float32=["conv_out", "conv_in"]),
        ),
    ],
)
def test_what_rebuilds_nothing_changes_no_key(one: str, other: str, tiny_model: Path, tmp_path: Path) -> None:
    store = tmp_path / "none"
    assert keys(plan(tiny_model, store, tmp_path, one)) == keys(plan(tiny_model, store, tmp_path, other))


def test_what_is_kept_in_float16_changes_graph_weights_and_engines(tiny_model: Path, tmp_path: Path) -> None:
    texts = [own("denoiser", dtype="float16", keep_float32=kept) for kept in (["conv_in"], ["conv_out"])]
    first, second = (keys(plan(tiny_model, tmp_path / "none", tmp_path, text)) for text in texts)
    changed = {name for name in first if first[name] != second[name]}
    assert {name.split()[0] for name in changed} == {"graph", "weights", "packed", "engine"}
    assert all(" denoiser" in name for name in changed)


def quantized(component: str, backend: str = "onnxruntime", *, weights: str = "int8", **values: Any) -> str:
    """The tiny recipe with weights in few bits."""
    text = own(f"{component}.quantize", weights=weights, **values)
    return text.replace('family = "sd"', f'family = "sd"\nbackend = "{backend}"')


def test_weights_in_int8_change_weights_and_engines_alone(tiny_model: Path, tmp_path: Path) -> None:
    """The export is shared. So are the artifacts of a list of exclusions in another order."""
    texts = [RECIPE, *(quantized("denoiser", exclude=names) for names in (["conv_in"], ["mid_block"]))]
    texts.append(quantized("denoiser", exclude=["mid_block"], scales="mse"))
    plans = [keys(plan(tiny_model, tmp_path / "none", tmp_path, text)) for text in texts]
    for one, other in itertools.pairwise(plans):
        changed = {name for name in {*one, *other} if one.get(name) != other.get(name)}
        assert {name.split()[0] for name in changed} == {"weights", "packed", "engine", "gate"}
        assert all(" denoiser" in name for name in changed if not name.startswith("gate "))
    orders = [quantized("denoiser", exclude=names) for names in (["mid*", "*"], ["*", "mid*"])]
    assert len({str(keys(plan(tiny_model, tmp_path / "none", tmp_path, text))) for text in orders}) == 1


def test_a_changed_exclusion_is_named(built: dict[str, str], tmp_path: Path) -> None:
    made = plan(built["model"], built["store"], tmp_path, quantized("denoiser", exclude=["mid_block"]))
    (step,) = (s for s in made.steps if s.id == StepId("weights", "denoiser"))
    assert any(reason.startswith("quantize: null -> ") for reason in step.reasons), step.reasons
    facts = made.quantized["denoiser"]
    assert facts["weights"] > 10
    assert plan_json(made)["quantized"] == made.quantized
    assert any(name.startswith("mid_block.") for name in facts["left"]["excluded"])
    said = f"denoiser: {facts['weights']} of {facts['of']} weights in int8; left alone: "
    assert any(line.startswith(said) for line in plan_lines(made))
    assert plan(built["model"], built["store"], tmp_path, RECIPE).quantized == {}


# --- reasons ----------------------------------------------------------------------------------------------------------


def test_a_changed_config_names_the_key_and_both_values(built: dict[str, str], tiny_copy: Path, tmp_path: Path) -> None:
    edit(tiny_copy / "unet" / "config.json", norm_eps=0.5, block_out_channels=[32, 96])
    edit(tiny_copy / "scheduler" / "scheduler_config.json", beta_end=0.5)
    made = plan(tiny_copy, built["store"], tmp_path, RECIPE)
    expected = ("config.block_out_channels[1]: 64 -> 96", "config.norm_eps: 1e-05 -> 0.5")
    assert made.step(StepId("graph", "denoiser", "1x64x64")).reasons == expected
    assert set(expected) <= set(made.step(StepId("weights", "denoiser")).reasons)
    assert made.step(StepId("sampler", "euler")).reasons == ("config.beta_end: 0.012 -> 0.5",)
    assert "config.norm_eps: 1e-05 -> 0.5" in "\n".join(plan_lines(made))


def test_a_changed_tokenizer_names_the_setting(built: dict[str, str], tiny_copy: Path, tmp_path: Path) -> None:
    edit(tiny_copy / "tokenizer" / "tokenizer_config.json", do_lower_case=False)
    (change,) = plan(tiny_copy, built["store"], tmp_path, RECIPE).step(StepId("tokenizer", "tokenizer")).reasons
    assert change.startswith("files.tokenizer_config.json.do_lower_case: ")
    assert change.endswith(" -> false")


def test_infinities_of_a_config_are_values_too(built: dict[str, str], tiny_copy: Path, tmp_path: Path) -> None:
    """As diffusers writes them: lambda_min_clipped is -Infinity in most configs of DPM solvers."""
    edit(tiny_copy / "scheduler" / "scheduler_config.json", lambda_min_clipped=float("-inf"))
    made = plan(tiny_copy, built["store"], tmp_path, RECIPE)
    assert made.step(StepId("sampler", "euler")).reasons == ('config.lambda_min_clipped: (absent) -> "-inf"',)


def test_another_file_name_is_compared_with_what_was_built(built: dict[str, str], tmp_path: Path) -> None:
    """A recipe that was copied and edited: the same model was built by it under its old name."""
    text = RECIPE + '\n[onnxruntime]\noptimization = "basic"\n'
    made = plan(built["model"], built["store"], tmp_path, text, name="copied")
    misses = [step for step in made.steps if not step.hit]
    assert {step.stage for step in misses} == {"engine"}
    for step in misses:
        assert step.reasons[0] == 'recipe.name: "tiny" -> "copied"'
        assert 'options.optimization: "all" -> "basic"' in step.reasons
    lines = "\n".join(plan_lines(made))
    assert 'a recipe of another name, as this one was never built: "tiny" -> "copied"' in lines
    assert "not built yet" not in lines
    assert any("recipe.name" in line for line in plan_json(made)["steps"][-1]["changed"])


def test_another_model_is_not_compared(built: dict[str, str], tiny_copy: Path, tmp_path: Path) -> None:
    """Under another name too, it has nothing to do with what is there."""
    edit(tiny_copy / "unet" / "config.json", norm_eps=0.5)
    made = plan(tiny_copy, built["store"], tmp_path, RECIPE, name="other")
    assert made.step(StepId("graph", "denoiser", "1x64x64")).reasons == ()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("component", "dtype", "pattern", "said"),
    [
        ("denoiser", "float16", "conv_inn", "no module matches 'conv_inn', did you mean 'conv_in'?"),
        ("denoiser", "float32", "unet.conv_in", "no module matches 'unet.conv_in'"),
        ("text_encoder", "float16", "decoder.*", "no module matches 'decoder.*'"),
    ],
)
def test_a_pattern_that_matches_nothing(
    component: str, dtype: str, pattern: str, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    text = own(component, dtype=dtype, keep_float32=["*_embedding*", pattern] if component == "denoiser" else [pattern])
    with pytest.raises(RecipeError) as error:
        plan(tiny_model, tmp_path / "none", tmp_path, text)
    assert f"components.{component}.keep_float32: {said}" in str(error.value)
    assert "expected names or patterns of modules" in str(error.value)
    assert "_embedding" not in str(error.value).split("(expected")[0]


def test_an_exclusion_that_matches_nothing(built: dict[str, str], tmp_path: Path) -> None:
    """An exported graph knows nothing of exclusions, and vouches for none."""
    for component, wrong, close in (
        ("denoiser", "mid_blok", "mid_block"),
        ("text_encoder", "encoder.layer", "encoder"),
        ("vae_decoder", "encoder.mid_block", "decoder.mid_block"),  # the other half of the network
        ("vae_encoder", "post_quant_conv", "quant_conv"),
    ):
        with pytest.raises(RecipeError) as error:
            plan(built["model"], built["store"], tmp_path, quantized(component, exclude=["*", wrong]))
        said = f"components.{component}.quantize.exclude: no module matches {wrong!r}, did you mean '{close}"
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("backend", "more", "said"),
    [
        (
            "onnxruntime_cuda",
            "",
            "onnxruntime_cuda cannot run quantised weights (expected onnxruntime, tensorrt or tensorrt_rtx)",
        ),
        (
            "tensorrt",
            "[tensorrt]\nstrip_plan = true\n",
            "tensorrt.strip_plan fills in plain weights alone (expected false)",
        ),
    ],
)
def test_what_cannot_have_quantised_weights(
    backend: str, more: str, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError) as error:
        plan(tiny_model, tmp_path / "none", tmp_path, f"{quantized('denoiser', backend)}{more}")
    assert f"components.denoiser.quantize: {said}" in str(error.value)


@pytest.mark.parametrize(
    ("targets", "got"),
    [
        ("", "none named, which stands for all from 8.0 on"),
        ('targets = ["8.6", "8.9"]', "8.6, 8.9"),
        ('targets = ["8.9", "12.0"]', None),
    ],
)
def test_float8_for_targets_that_have_none(targets: str, got: str | None, tiny_model: Path, tmp_path: Path) -> None:
    """Told while planning, on any machine: the builder would say it after an hour, and not say what can."""
    text = f"{quantized('denoiser', 'tensorrt_rtx', weights='float8')}\n[tensorrt_rtx]\n{targets}\n"
    if got is None:
        assert plan(tiny_model, tmp_path / "none", tmp_path, text).steps
        return
    with pytest.raises(RecipeError) as error:
        plan(tiny_model, tmp_path / "none", tmp_path, text)
    assert (
        "components.denoiser.quantize: float8 came with 8.9 (expected tensorrt_rtx.targets of 8.9, 12.0, 12.1; "
        f"got {got})" in str(error.value)
    )


@pytest.mark.parametrize("level", ["none", "same_compute_capability", "ampere_plus"])
def test_float8_for_gpus_of_which_some_have_none(level: str, tiny_model: Path, tmp_path: Path) -> None:
    table = f'[tensorrt]\nhardware_compatibility_level = "{level}"\n'
    text = f"{quantized('denoiser', 'tensorrt', weights='float8')}\n{table}"
    with pretended(FAKE_CUDA_CC="8.9", DIFFBUILD_CACHE=str(tmp_path)):
        if level != "ampere_plus":
            assert plan(tiny_model, tmp_path / "none", tmp_path, text).refused is None
            return
        with pytest.raises(RecipeError) as error:
            plan(tiny_model, tmp_path / "none", tmp_path, text)
    assert (
        "components.denoiser.quantize: float8 came with 8.9, and tensorrt.hardware_compatibility_level is for 8.0 and "
        'newer (expected "none" or "same_compute_capability"; got "ampere_plus")' in str(error.value)
    )


@pytest.mark.parametrize("capability", ["8.6", "8.9"])
def test_float8_on_a_gpu(capability: str, tiny_model: Path, tmp_path: Path) -> None:
    with pretended(FAKE_CUDA_CC=capability, FAKE_CUDA_GPU="NVIDIA RTX A5000", DIFFBUILD_CACHE=str(tmp_path)):
        text = quantized("denoiser", "tensorrt", weights="float8")
        if capability == "8.9":
            assert plan(tiny_model, tmp_path / "none", tmp_path, text).refused is None
            return
        with pytest.raises(RecipeError) as error:
            plan(tiny_model, tmp_path / "none", tmp_path, text)
    assert (
        "components.denoiser.quantize: NVIDIA RTX A5000 (compute capability 8.6) has no float8, which came with 8.9 "
        "(expected int8 or int4)" in str(error.value)
    )


@pytest.mark.parametrize(
    ("component", "table", "said"),
    [
        (
            "denoiser",
            {"weights": "int8", "block_size": 32},
            ".block_size: only int4 has blocks (expected no such key, weights are int8)",
        ),
        (
            "vae_decoder",
            {"weights": "float8"},
            ".weights: float8 has three bits of mantissa, too few for what a VAE draws "
            "(expected int8, or insist = true beside it)",
        ),
        (
            "denoiser",
            {"weights": "float8", "insist": True},
            ".insist: nothing of this table has to be insisted on (expected no such key)",
        ),
        ("vae_decoder", {"weights": "float8", "insist": True}, None),
        ("denoiser", {"weights": "int4", "block_size": 128}, None),
    ],
)
def test_keys_that_do_not_fit_together(
    component: str, table: dict[str, Any], said: str | None, tiny_model: Path, tmp_path: Path
) -> None:
    text = quantized(component, **table)
    if said is None:
        assert plan(tiny_model, tmp_path / "none", tmp_path, text).steps
        return
    with pytest.raises(RecipeError) as error:
        plan(tiny_model, tmp_path / "none", tmp_path, text)
    assert f"components.{component}.quantize{said}" in str(error.value)


def test_a_block_of_64_is_the_default(tiny_model: Path, tmp_path: Path) -> None:
    """Named or not, and insisted on or not, it is the same artifact."""
    texts = [quantized("denoiser", weights="int4", block_size=size) for size in (0, 64, 32)]
    plans = [plan(tiny_model, tmp_path / "none", tmp_path, text) for text in texts]
    unnamed, named, other = ([step.key for step in made.steps] for made in plans)
    assert unnamed == named != other


def test_patterns_of_all_components_are_told_at_once(tiny_model: Path, tmp_path: Path) -> None:
    text = own("denoiser", dtype="float16", keep_float32=["a", "b"])
    text += '\n[components.vae_decoder]\ndtype = "float16"\nkeep_float32 = ["c"]\n'
    with pytest.raises(RecipeError) as error:
        plan(tiny_model, tmp_path / "none", tmp_path, text)
    assert all(f"no module matches {name!r}" in str(error.value) for name in "abc")


def test_older_names_are_none_of_the_network(tiny_copy: Path, tmp_path: Path) -> None:
    """A checkpoint may call to_q query, as a module that no longer exists."""
    from safetensors.numpy import load_file, save_file

    (file,) = (tiny_copy / "vae").glob("*.safetensors")
    save_file({name.replace(".to_q.", ".query."): tensor for name, tensor in load_file(file).items()}, file)
    plan(tiny_copy, tmp_path / "none", tmp_path, quantized("vae_decoder", exclude=["*.to_q"]))
    with pytest.raises(RecipeError, match=r"no module matches '\*\.query'"):
        plan(tiny_copy, tmp_path / "none", tmp_path, quantized("vae_decoder", exclude=["*.query"]))


def test_checking_a_recipe_against_a_model_sees_patterns(tiny_model: Path, tmp_path: Path) -> None:
    recipe = write(tmp_path / "tiny.toml", quantized("denoiser", exclude=["mid_blok"]))
    with pytest.raises(RecipeError, match="did you mean 'mid_block"):
        toolchain.api.check_recipe_file(recipe, str(tiny_model))
    wrong = own("denoiser", dtype="float16", keep_float32=["conv_inn"])
    kept = write(tmp_path / "kept.toml", wrong)
    with pytest.raises(RecipeError, match="no module matches 'conv_inn'"):
        toolchain.api.check_recipe_file(kept, str(tiny_model))


def test_an_exported_graph_forecasts_no_quantised_engine(built: dict[str, str], tmp_path: Path) -> None:
    """What it knows of weights and activations is about floats."""
    plain, small = (plan(built["model"], built["store"], tmp_path, text) for text in (RECIPE, quantized("denoiser")))
    assert "denoiser" in {engine.component for engine in toolchain.api.plan_memory(plain)}
    assert {engine.component for engine in toolchain.api.plan_memory(plain)} - {
        engine.component for engine in toolchain.api.plan_memory(small)
    } == {"denoiser"}


def test_a_module_without_weights_is_a_module(tiny_model: Path, tmp_path: Path) -> None:
    """No checkpoint holds its name."""
    plan(tiny_model, tmp_path / "none", tmp_path, own("denoiser", dtype="float16", keep_float32=["conv_act"]))


def test_patterns_are_told_without_weights(tiny_copy: Path, tmp_path: Path) -> None:
    for file in tiny_copy.rglob("*.safetensors"):
        file.unlink()
    recipe = write(tmp_path / "tiny.toml", own("vae_encoder", dtype="float16", keep_float32=["encoder.conv_in", "x"]))
    with pytest.raises(RecipeError, match=r"vae_encoder\.keep_float32: no module matches 'x'"):
        toolchain.export_graphs(recipe, str(tiny_copy), tmp_path / "graphs", store=tmp_path / "none")


def test_patterns_that_match_cost_no_torch(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError("the network was made")

    monkeypatch.setattr("toolchain.export.capture.make_module", fail)
    kept = ["conv_in", "*.norm1", "down_blocks.0.resnets.*"]
    plan(tiny_model, tmp_path / "none", tmp_path, own("denoiser", dtype="float16", keep_float32=kept))


@pytest.mark.parametrize("place", ["scheduler", "schedulers"])
@pytest.mark.parametrize("name", ["flow-euler", "edm-euler", "cogvideox-ddim", "ipndm"])
def test_a_scheduler_of_another_family(name: str, place: str, tiny_model: Path, tmp_path: Path) -> None:
    text = RECIPE.replace(
        *{
            "scheduler": ('scheduler = "euler"', f'scheduler = "{name}"'),
            "schedulers": ('["model", "euler", "euler-a"]', f'["model", "{name}"]'),
        }[place]
    )
    assert text != RECIPE
    with pytest.raises(RecipeError) as error:
        plan(tiny_model, tmp_path / "none", tmp_path, text)
    assert f"sampling.schedulers: the scheduler {name} is for " in str(error.value)
    assert "models, and this model is beta (expected one of ddim, " in str(error.value)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (FLOW, "the scheduler euler is for beta models, and this model is flow (expected one of dpm++2m"),
        ({"_class_name": "DPMSolverSDEScheduler"}, "the model's own scheduler cannot be compiled: its noise is one"),
    ],
)
def test_what_the_model_says_of_its_scheduler(
    config: dict[str, Any], said: str, tiny_copy: Path, tmp_path: Path
) -> None:
    (tiny_copy / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))
    edit(tiny_copy / "model_index.json", scheduler=["diffusers", config["_class_name"]])
    with pytest.raises(RecipeError) as error:
        plan(tiny_copy, tmp_path / "none", tmp_path, RECIPE)
    assert said in str(error.value)
    # Its graphs have nothing to do with that.
    toolchain.plan_build(write(tmp_path / "g.toml", RECIPE), str(tiny_copy), store=tmp_path / "none", graphs_only=True)
