"""Recipes: what parses, and what every wrong one says."""

import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import RecipeError
from toolchain.recipe import (
    Bucket,
    Calibration,
    Check,
    ComponentRecipe,
    Quantize,
    Recipe,
    Sampling,
    Tolerance,
    load_recipe,
    parse_recipe,
)
from toolchain.recipe.options import OnnxRuntimeCudaOptions, OnnxRuntimeOptions, TensorRtOptions, TensorRtRtxOptions
from toolchain.recipe.schema import TOLERANCES

ROOT = Path(__file__).parents[1]
SHIPPED = sorted((ROOT / "recipes").glob("*.toml"))
SMALLEST = """
family = "sd"
buckets = ["1x64x64"]
[check]
prompts = ["a circle"]
"""
BUCKET = 'batch x height x width in pixels, such as "1x512x768", sizes in multiples of 8'
TEXT, COUNT, FROM_0 = "a non-empty string", "an integer of 1 or more", "a number of 0 or more"
ABOVE_0, SHARE, ENTRIES = "a number above 0", "a number above 0, at most 1", "a list with at least one entry"


def parse(text: str) -> Recipe:
    return parse_recipe(text, "test", "recipes/test.toml")


def problems(text: str) -> list[str]:
    """The lines of the error, less the first (the count) and the last (where)."""
    with pytest.raises(RecipeError) as caught:
        parse(text)
    first, *lines, where = str(caught.value).splitlines()
    assert first == ("1 problem in the recipe:" if len(lines) == 1 else f"{len(lines)} problems in the recipe:")
    assert where == "  where: recipes/test.toml"
    return [line.removeprefix("  ") for line in lines]


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "test.toml"
    path.write_bytes(b"\xef\xbb\xbf" + SMALLEST.encode())
    assert load_recipe(path) == parse(SMALLEST)


def test_defaults() -> None:
    assert parse(SMALLEST) == Recipe(
        name="test",
        family="sd",
        backend="onnxruntime",
        buckets=(Bucket(1, 64, 64),),
        classifier_free_guidance=True,
        components={},
        sampling=Sampling("model", 20, 5.0, ("model",), ("1-50",)),
        onnxruntime=OnnxRuntimeOptions("all", 0),
        onnxruntime_cuda=OnnxRuntimeCudaOptions("all", True, False, True),
        tensorrt=TensorRtOptions(3, 0, "none", "none", False, False, -1, "", True, "step"),
        tensorrt_rtx=TensorRtRtxOptions((), True, True, "eager", "step"),
        calibration=None,
        check=Check(("a circle",), (0,), 0.0, 0.98, {}),
    )
    assert parse(SMALLEST).component("denoiser") == ComponentRecipe("float32", ())
    assert parse(SMALLEST).tolerance("denoiser") == Tolerance(0.99999, 60.0, 1e-3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_tolerance_follows_the_type(dtype: str) -> None:
    """It is the one that the shipped recipes of that type were given; a table takes its place as a whole."""
    recipe = parse(f'{SMALLEST}\n[components.denoiser]\ndtype = "{dtype}"\n')
    shipped = load_recipe("flux1-dev-bf16" if dtype == "bfloat16" else "sd15-fp16-tensorrt")
    assert recipe.tolerance("denoiser") == shipped.check.components["denoiser"]
    assert recipe.tolerance("vae_decoder") == Tolerance()
    table = parse(f'{SMALLEST}\n[components.denoiser]\ndtype = "{dtype}"\n[check.components.denoiser]\nsnr_db = 9\n')
    assert table.tolerance("denoiser") == Tolerance(snr_db=9.0)


@pytest.mark.parametrize(
    ("weights", "cost"),
    [
        ("int8", {"float32": "float16", "float16": "float16", "bfloat16": "bfloat16"}),
        ("float8", {"float32": "bfloat16", "float16": "bfloat16", "bfloat16": "bfloat16"}),
        ("int4", {"float32": "int4", "float16": "int4", "bfloat16": "int4"}),
    ],
)
def test_quantised_weights_have_the_tolerance_of_what_they_cost(weights: str, cost: dict[str, str]) -> None:
    for dtype, same in cost.items():
        table = f'dtype = "{dtype}"\n[components.denoiser.quantize]\nweights = "{weights}"\n'
        assert parse(f"{SMALLEST}\n[components.denoiser]\n{table}").tolerance("denoiser") == TOLERANCES[same]
        rounded = parse(f'{SMALLEST}\n[components.denoiser]\n{table}activations = "int8"\n')
        assert rounded.tolerance("denoiser") == TOLERANCES["int4" if weights == "int4" else "bfloat16"]


FULL = """
family = "sd"
backend = "tensorrt"
buckets = ["1x64x64", "4x64x128"]
classifier_free_guidance = false
[components.denoiser]
dtype = "bfloat16"
keep_float32 = ["time_embedding", "up_blocks.*.norm"]
[components.denoiser.quantize]
weights = "int8"
exclude = ["mid_block", "*.to_out"]
scales = "mse"
activations = "int8"
ranges = "percentile=99.9"
smoothing = 0.5
[components.text_encoder_2]
[sampling]
scheduler = "euler"
steps = 8
guidance = 7
schedulers = ["ddim", "euler"]
step_counts = [8, 20]
[onnxruntime]
optimization = "basic"
threads = 2
[onnxruntime_cuda]
optimization = "extended"
cuda_graph = false
prefer_nhwc = true
tf32 = false
[tensorrt]
builder_optimization_level = 5
workspace_mb = 4096
tiling_optimization_level = "fast"
hardware_compatibility_level = "same_compute_capability"
strip_plan = true
profile_per_bucket = true
max_aux_streams = 0
build_route = "-a=1 -b=2"
tf32 = false
cuda_graph = "loop"
[tensorrt_rtx]
targets = ["12.0", "8.9"]
profile_per_bucket = false
tf32 = false
kernel_specialization = "lazy"
cuda_graph = "off"
[calibration]
prompts = ["a red circle", "night"]
seeds = [0, 18446744073709551615]
scheduler = "ddim"
steps = 8
[check]
prompts = ["a", "b"]
seeds = [0, 18446744073709551615]
psnr_db = 30
ssim = 1
[check.components.denoiser]
cosine = 0.99
snr_db = 40
max_error = 0.5
[check.components.vae_decoder]
snr_db = 30.5
"""


def test_step_counts_are_numbers_and_ranges() -> None:
    """Whether a number was asked for by itself tells whether its table may be left out."""
    text = SMALLEST + "[sampling]\nsteps = 7\nstep_counts = ['1-3', 3, '9-9']\nschedulers = ['euler', 'ddim']\n"
    grid = {1: False, 2: False, 3: True, 9: False}
    assert parse(text).sampling.tables == {"model": grid | {7: True}, "euler": grid, "ddim": grid}
    assert parse(SMALLEST).sampling.tables == {"model": {n: n == 20 for n in range(1, 51)}}
    assert Recipe.from_json(parse(text).to_json()) == parse(text)
    for wrong in ("0-3", "3-1", "1-", "-3", "1-3-5", "01-3", " 1-3", "all"):
        with pytest.raises(RecipeError, match=r"step_counts\[0\]: out of range"):
            parse(SMALLEST + f"[sampling]\nstep_counts = ['{wrong}']\n")


def test_every_key() -> None:
    recipe = parse(FULL)
    assert recipe.buckets == (Bucket(batch=1, height=64, width=64), Bucket(batch=4, height=64, width=128))
    quantize = Quantize("int8", ("mid_block", "*.to_out"), "mse", "int8", "percentile=99.9", 0.5)
    kept = ("time_embedding", "up_blocks.*.norm")
    assert recipe.component("denoiser") == ComponentRecipe("bfloat16", kept, 0, quantize)
    assert recipe.component("text_encoder_2") == ComponentRecipe()
    assert recipe.sampling == Sampling("euler", 8, 7.0, ("ddim", "euler"), (8, 20))
    assert type(recipe.sampling.guidance) is float
    assert recipe.sampling.tables == {"euler": {8: True, 20: True}, "ddim": {8: True, 20: True}}
    assert recipe.onnxruntime == OnnxRuntimeOptions("basic", 2)
    assert recipe.onnxruntime_cuda == OnnxRuntimeCudaOptions("extended", False, True, False)
    assert recipe.tensorrt == TensorRtOptions(
        5, 4096, "fast", "same_compute_capability", True, True, 0, "-a=1 -b=2", False, "loop"
    )
    assert recipe.tensorrt_rtx == TensorRtRtxOptions(("12.0", "8.9"), False, False, "lazy", "off")
    assert recipe.calibration == Calibration(("a red circle", "night"), (0, 2**64 - 1), "ddim", 8)
    assert recipe.check.seeds == (0, 2**64 - 1)
    assert recipe.tolerance("denoiser") == Tolerance(0.99, 40.0, 0.5)
    assert recipe.tolerance("vae_decoder") == Tolerance(snr_db=30.5)


@pytest.mark.parametrize(
    ("text", "least"),
    [
        ("", 60.0),
        ("[check]psnr_db = 45", 45.0),
        ('[components.vae_decoder]\ndtype = "float16"', 40.0),
        ('[components.vae_decoder]\nkeep_float32 = ["*"]', 60.0),
        ('[components.vae_decoder.quantize]\nweights = "int8"', 40.0),
        ('[components.denoiser.quantize]\nweights = "int4"', 28.0),
        ('[components.denoiser.quantize]\nweights = "float8"', 28.0),
        ('backend = "tensorrt"', 40.0),
        ('backend = "tensorrt"\n[tensorrt]\ntf32 = false', 60.0),
    ],
)
def test_pictures_of_exact_float32_have_a_gate_of_their_own(text: str, least: float) -> None:
    check = 'prompts = ["a"]'
    if text.startswith("[check]"):
        text, check = "", f"{check}\n{text.removeprefix('[check]')}"
    recipe = parse(f'family = "sd"\nbuckets = ["1x64x64"]\n{text}\n[check]\n{check}\n')
    assert recipe.picture_limits == {"psnr_db": least, "ssim": 0.98}


@pytest.mark.parametrize("text", [SMALLEST, FULL])
def test_json_and_pickle_round_trips(text: str) -> None:
    recipe = parse(text)
    plain = recipe.to_json()
    again = Recipe.from_json(json.loads(json.dumps(plain, allow_nan=False)))
    assert again == recipe
    assert again.to_json() == plain
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(again) == hash(recipe)


def test_a_list_of_prompts_has_a_name() -> None:
    recipe = parse(f'{SMALLEST}[calibration]\nprompts = "varied-64"\n')
    assert recipe.calibration is not None
    prompts = recipe.calibration.prompts
    assert len(prompts) == len({prompt.lower() for prompt in prompts}) == 64
    assert recipe.to_json()["calibration"]["prompts"] == [*prompts]  # written out, as everything is
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_json_is_as_strict() -> None:
    plain = parse(SMALLEST).to_json()
    assert plain["name"] == "test"
    assert plain["buckets"] == ["1x64x64"]
    plain["sampling"] |= {"steps": 20.0, "more": 1}
    plain["name"] = None
    with pytest.raises(RecipeError, match="3 problems") as caught:
        Recipe.from_json(plain)
    for line in (
        f"name: wrong type (expected {TEXT}, got None)",
        "sampling.more: unknown key",
        "sampling.steps: wrong",
    ):
        assert line in str(caught.value)


MANY = """
famly = "sd"
backend = ""
buckets = ["1x64x64", "1x64x64", "1x63x64", "0x64x64", "1x-8x8", "64x64", "1X64x64", "01x64x64", " 1x64x64", 3]
classifier_free_guidance = 1
name = "other"
[components.denoiser]
dtype = "float61"
keep_float32 = "norm"
dtpye = "float16"
[components."up blocks"]
dtype = 16
[sampling]
scheduler = 3
steps = 0
guidance = nan
schedulers = ["euler", "euler", " "]
step_counts = [20, 30.0, true, "50", 0]
[onnxruntime]
optimization = "layout"
threads = -1
[tensorrt]
builder_optimization_level = 6
max_aux_streams = -2
fp16 = true
[check]
prompts = []
seeds = [-1, 1.0, 18446744073709551616, 7, 7]
psnr_db = "40"
ssim = 1.01
[check.components.denoiser]
cosine = 0
snr_db = inf
max_error = true
[check.components]
vae_decoder.cosin = 1
"""
KEYS = "family, backend, buckets, classifier_free_guidance, without, components, sampling, safety, onnxruntime, "
KEYS += "onnxruntime_cuda, openvino, tensorrt, tensorrt_rtx, calibration, check"
STEP_COUNT = 'a number of steps from 1, or a range such as "1-50"'
SEED = "an integer from 0 to 2**64 - 1"
MANY_LINES = [
    f"famly: unknown key, did you mean 'family'? (expected one of {KEYS}, got 'famly')",
    f"name: unknown key (expected one of {KEYS}, got 'name')",
    f"family: missing key (expected {TEXT}, got nothing)",
    f"backend: empty (expected {TEXT}, got '')",
    "buckets[1]: duplicate (expected each entry once, got '1x64x64')",
    f"buckets[2]: not a multiple of 8 (expected {BUCKET}, got '1x63x64')",
    f"buckets[3]: not positive (expected {BUCKET}, got '0x64x64')",
    f"buckets[4]: not positive (expected {BUCKET}, got '1x-8x8')",
    f"buckets[5]: not a bucket (expected {BUCKET}, got '64x64')",
    f"buckets[6]: not a bucket (expected {BUCKET}, got '1X64x64')",
    f"buckets[7]: not a bucket (expected {BUCKET}, got '01x64x64')",
    f"buckets[8]: not a bucket (expected {BUCKET}, got ' 1x64x64')",
    f"buckets[9]: wrong type (expected {BUCKET}, got 3)",
    "classifier_free_guidance: wrong type (expected true or false, got 1)",
    "components.denoiser.dtpye: unknown key, did you mean 'dtype'? "
    "(expected one of dtype, keep_float32, tokens, quantize, got 'dtpye')",
    "components.denoiser.dtype: unknown value, did you mean 'float16'? "
    "(expected one of 'float32', 'float16', 'bfloat16', got 'float61')",
    f"components.denoiser.keep_float32: wrong type (expected a list, each {TEXT}, got 'norm')",
    "components.'up blocks'.dtype: wrong type (expected one of 'float32', 'float16', 'bfloat16', got 16)",
    f"sampling.scheduler: wrong type (expected {TEXT}, got 3)",
    f"sampling.steps: out of range (expected {COUNT}, got 0)",
    "sampling.guidance: out of range (expected a number of 0 or more, got nan)",
    "sampling.schedulers[1]: duplicate (expected each entry once, got 'euler')",
    f"sampling.schedulers[2]: empty (expected {TEXT}, got ' ')",
    f"sampling.step_counts[1]: wrong type (expected {STEP_COUNT}, got 30.0)",
    f"sampling.step_counts[2]: wrong type (expected {STEP_COUNT}, got true)",
    f"sampling.step_counts[3]: out of range (expected {STEP_COUNT}, got '50')",
    f"sampling.step_counts[4]: out of range (expected {STEP_COUNT}, got 0)",
    "onnxruntime.optimization: unknown value (expected one of 'basic', 'extended', 'all', got 'layout')",
    "onnxruntime.threads: out of range (expected an integer from 0 to 1024, got -1)",
    "tensorrt.fp16: unknown key (expected one of builder_optimization_level, workspace_mb, tiling_optimization_level, "
    "hardware_compatibility_level, strip_plan, profile_per_bucket, max_aux_streams, build_route, tf32, cuda_graph, "
    "got 'fp16')",
    "tensorrt.builder_optimization_level: out of range (expected an integer from 0 to 5, got 6)",
    "tensorrt.max_aux_streams: out of range (expected an integer of -1 or more, got -2)",
    f"check.prompts: empty (expected {ENTRIES}, got [])",
    f"check.seeds[0]: out of range (expected {SEED}, got -1)",
    f"check.seeds[1]: wrong type (expected {SEED}, got 1.0)",
    f"check.seeds[2]: out of range (expected {SEED}, got 18446744073709551616)",
    "check.seeds[4]: duplicate (expected each entry once, got 7)",
    "check.psnr_db: wrong type (expected a number of 0 or more, got '40')",
    f"check.ssim: out of range (expected {SHARE}, got 1.01)",
    f"check.components.denoiser.cosine: out of range (expected {SHARE}, got 0)",
    f"check.components.denoiser.snr_db: out of range (expected {ABOVE_0}, got inf)",
    f"check.components.denoiser.max_error: wrong type (expected {SHARE}, got true)",
    "check.components.vae_decoder.cosin: unknown key, did you mean 'cosine'? "
    "(expected one of cosine, snr_db, max_error, got 'cosin')",
]


def test_all_problems_at_once() -> None:
    assert problems(MANY) == MANY_LINES


def changed(**values: str) -> str:
    """The smallest recipe with top-level keys replaced by TOML source."""
    keys = {"family": '"sd"', "buckets": '["1x64x64"]', "check": '{prompts = ["a"]}'} | values
    return "\n".join(f"{key} = {value}" for key, value in keys.items() if value)


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        (
            "",
            [
                f"family: missing key (expected {TEXT}, got nothing)",
                f"buckets: missing key (expected {ENTRIES}, got nothing)",
                f"check.prompts: missing key (expected {ENTRIES}, got nothing)",
            ],
        ),
        (changed(buckets="[]"), [f"buckets: empty (expected {ENTRIES}, got [])"]),
        (
            changed(buckets='"1x64x64"'),
            ["buckets: unknown name (expected a list of buckets, or one of sdxl-aspect-ratios, got '1x64x64')"],
        ),
        (
            changed(buckets='"sdxl-aspect"'),
            [
                "buckets: unknown name, did you mean 'sdxl-aspect-ratios'? "
                "(expected a list of buckets, or one of sdxl-aspect-ratios, got 'sdxl-aspect')"
            ],
        ),
        (changed(calibration="{}"), [f"calibration.prompts: missing key (expected {ENTRIES}, got nothing)"]),
        (changed(calibration="{prompts = []}"), [f"calibration.prompts: empty (expected {ENTRIES}, got [])"]),
        (
            changed(calibration='{prompts = "varied", seeds = [], scheduler = 1, steps = -1, guidance = 3}'),
            [
                "calibration.guidance: unknown key (expected one of prompts, seeds, scheduler, steps, got 'guidance')",
                "calibration.prompts: unknown name, did you mean 'varied-64'? "
                "(expected a list of prompts, or one of varied-64, got 'varied')",
                f"calibration.seeds: empty (expected {ENTRIES}, got [])",
                "calibration.scheduler: wrong type (expected a string, got 1)",
                "calibration.steps: out of range (expected an integer of 0 or more, got -1)",
            ],
        ),
        (
            changed(calibration='{prompts = ["a", " ", "a"]}'),
            [
                "calibration.prompts[1]: empty (expected a prompt that is not empty, got ' ')",
                "calibration.prompts[2]: duplicate (expected each entry once, got 'a')",
            ],
        ),
        (changed(buckets="1"), [f"buckets: wrong type (expected a list, each {BUCKET}, got 1)"]),
        (changed(without='["a", "a"]'), ["without[1]: duplicate (expected each entry once, got 'a')"]),
        (
            changed(sampling="{strengths = [0.5, 1.5]}"),
            ["sampling.strengths[1]: out of range (expected a number above 0, at most 1, got 1.5)"],
        ),
        (changed(family="1979-05-27"), [f"family: wrong type (expected {TEXT}, got 1979-05-27)"]),
        (
            changed(tensorrt_rtx='{targets = ["9.0"]}'),
            ["tensorrt_rtx.targets[0]: unknown value, did you mean '8.0'? "
             "(expected one of '8.0', '8.6', '8.9', '12.0', '12.1', got '9.0')"],
        ),
        (
            changed(tensorrt_rtx="{strip_plan = true, workspace = 1}"),
            [
                "tensorrt_rtx.strip_plan: cannot be had: TensorRT for RTX strips and fills engines on a GPU alone; "
                "profile_per_bucket saves the space",
                "tensorrt_rtx.workspace: unknown key (expected one of targets, profile_per_bucket, tf32, "
                "kernel_specialization, cuda_graph, got 'workspace')",
            ],
        ),
        (changed(check="1"), ["check: wrong type (expected a table, got 1)"]),
        (changed(check='["a"]'), ["check: wrong type (expected a table, got ['a'])"]),
        (
            changed(components="{denoiser = {quantize = {}}}"),
            ["components.denoiser.quantize.weights: missing key (expected one of 'int8', 'int4', "
                "'float8', got nothing)"],
        ),
        (
            changed(components="{denoiser = {quantize = 'int8'}}"),
            ["components.denoiser.quantize: wrong type (expected a table, got 'int8')"],
        ),
        (
            changed(
                components="{denoiser = {quantize = {weights = 'int5', scales = 'min', exclude = ['', 'a', 'a'], "
                "activations = 'int9', smoothing = 2, ranges = '', alpha = 1, block_size = 16, insist = 1}}}"
            ),
            [
                "components.denoiser.quantize.alpha: unknown key (expected one of weights, exclude, scales, "
                "activations, ranges, smoothing, block_size, insist, got 'alpha')",
                "components.denoiser.quantize.weights: unknown value, did you mean 'int8'? "
                "(expected one of 'int8', 'int4', 'float8', got 'int5')",
                f"components.denoiser.quantize.exclude[0]: empty (expected {TEXT}, got '')",
                "components.denoiser.quantize.exclude[2]: duplicate (expected each entry once, got 'a')",
                "components.denoiser.quantize.scales: unknown value (expected one of 'max', 'mse', got 'min')",
                "components.denoiser.quantize.activations: unknown value, did you mean 'int8'? "
                "(expected one of 'none', 'int8', 'float8', got 'int9')",
                f"components.denoiser.quantize.ranges: empty (expected {TEXT}, got '')",
                "components.denoiser.quantize.smoothing: out of range (expected a number from 0 to 1, got 2)",
                "components.denoiser.quantize.block_size: out of range (expected 32, 64 or 128, or 0 for 64, got 16)",
                "components.denoiser.quantize.insist: wrong type (expected true or false, got 1)",
            ],
        ),
        (changed(components="{denoiser = 1}"), ["components.denoiser: wrong type (expected a table, got 1)"]),
        (changed(components="[[1, 2, 3, 4, {}]]"), ["components: wrong type (expected a table, got [[1, 2, 3, ...]])"]),
        (changed(sampling="{guidance = -0.5}"), [f"sampling.guidance: out of range (expected {FROM_0}, got -0.5)"]),
        (changed(sampling="{guidance = true}"), [f"sampling.guidance: wrong type (expected {FROM_0}, got true)"]),
        (
            changed(sampling=f"{{guidance = 1{'0' * 400}}}"),
            [f"sampling.guidance: out of range (expected {FROM_0}, got 1{'0' * 56}...)"],
        ),
        (changed(sampling="{step_counts = []}"), [f"sampling.step_counts: empty (expected {ENTRIES}, got [])"]),
        (changed(check='{prompts = ["a", ""]}'), [f"check.prompts[1]: empty (expected {TEXT}, got '')"]),
    ],
)  # fmt: skip
def test_each_problem(text: str, lines: list[str]) -> None:
    assert problems(text) == lines


@pytest.mark.parametrize(
    ("text", "where"),
    [
        ('family = "sd"\nbuckets = [\n  "1x64x64"\n  "2x64x64"\n]', "test.toml:4:3"),
        ("family = sd", "test.toml:1:10"),
        ('family = "a"\nfamily = "b"\n[check]', "test.toml:2:13"),
        ("family = [", "test.toml"),
        ("a = " + "[" * 5000, "test.toml"),
        ("a = 1" + "0" * 5000, "test.toml"),
    ],
)
def test_toml_errors_have_a_place(text: str, where: str) -> None:
    with pytest.raises(RecipeError, match="not TOML") as caught:
        parse(text)
    assert str(caught.value).splitlines()[-1] == f"  where: recipes/{where}"


def test_files_that_cannot_be_read_name_what_is_near(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    for name in ("recipes/b.toml", "a.toml", "pyproject.toml"):
        (tmp_path / name).write_text(SMALLEST)
    near = f"hint: recipes nearby: {tmp_path / 'a.toml'}, {tmp_path / 'recipes' / 'b.toml'}"
    for path in (tmp_path / "missing.toml", tmp_path):
        with pytest.raises(RecipeError) as caught:
            load_recipe(path)
        assert f"where: {path}" in str(caught.value)
        assert near in str(caught.value)
    with pytest.raises(RecipeError, match=r"hint: diffbuild recipes lists those that come with it"):
        load_recipe(tmp_path / "none" / "a.toml")


def test_a_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes(b'family = "\xe9"')
    with pytest.raises(RecipeError, match="byte 0xe9 at offset 10"):
        load_recipe(tmp_path / "a.toml")


@pytest.mark.parametrize("text", ["1x512x768", "16x8x8", "1x1024x1024"])
def test_bucket_text(text: str) -> None:
    assert str(Bucket.parse(text)) == text


def test_buckets_have_an_order() -> None:
    assert Bucket(1, 64, 128) < Bucket(1, 128, 64) < Bucket(2, 64, 64)


@pytest.mark.parametrize(
    "text", ["", "1x64", "1x64x64x3", "1x64x60", "0x64x64", "1\u00d764\u00d764", "\u0661x64x64", "1x64x64\n"]
)
def test_bucket_refuses(text: str) -> None:
    with pytest.raises(RecipeError, match="bucket: ") as caught:
        Bucket.parse(text)
    assert repr(text) in str(caught.value)


def test_recipes_are_shipped() -> None:
    assert {path.stem for path in SHIPPED} >= {"shapes-fp32", "sd15-fp32", "sd15-fp16"}


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_parse(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.name == path.stem
    assert Recipe.from_json(recipe.to_json()) == recipe


def test_import_is_light() -> None:
    code = "import sys, toolchain.recipe; print({'cattrs', 'numpy', 'torch', 'tomllib'} & {*sys.modules})"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert out.stdout.strip() == "set()"


def test_annotations_are_the_whole_schema() -> None:
    with pytest.raises(TypeError):
        Recipe(name="a", family="sd", buckets=())  # type: ignore[call-arg]
    values: dict[str, Any] = parse(SMALLEST).to_json()
    assert [*values] == ["name", *KEYS.split(", ")]
