"""Every shipped recipe is built in its own precisions and with its own options, on a tiny model of its family.

What is cut: the sizes, to those that tiny models have, the list of sampler tables, all but four prompts and two steps
of a calibration, and the gate, whose limits are for the model that a recipe is for. A recipe for ONNX Runtime draws,
one for TensorRT draws on the pretended GPU, one for TensorRT for RTX is built by NVIDIA's own builder: no GPU, no
picture. What a recipe for OpenVINO executes in which type is read from the compiled model.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import toolchain
import toolchain.api
from tests.openvino_here import has_bfloat16
from tests.parity import random_images
from tests.pretend import pretended
from tests.rtx import real_trt
from tests.tiny import make_sd
from tests.tiny_flux import make_flux
from tests.tiny_sd3 import make_sd3
from tests.tiny_sdxl import make_sdxl
from toolchain.cli.main import cli
from toolchain.engines.recommend import best_backend
from toolchain.engines.runners import RUNNERS
from toolchain.errors import DiffbuildError
from toolchain.recipe import Bucket, Recipe, load_recipe

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.toml"))
MODELS: dict[str, Callable[[Path], Path]] = {
    "sd": make_sd,
    "sdxl": make_sdxl,
    "sd3": lambda folder: make_sd3(folder, version="3.5"),
    "flux": make_flux,
}
KINDS: dict[str, Callable[[Path], Path]] = {
    "schnell": lambda folder: make_flux(folder, guidance_embeds=False),
    "int4": lambda folder: make_flux(folder, t5_width=128, heads=4),  # else no layer would have whole blocks
}
"""Part of a recipe's name -> its model."""
BUCKETS = {
    "sd": ("1x64x64", "2x64x96"),
    "sdxl": ("1x64x64", "2x64x96"),
    "sd3": ("1x64x64", "1x96x128"),
    "flux": ("1x64x64", "2x64x64"),
}
STEPS = 2


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Recipe], Path]:
    """The tiny model that a recipe is for, made once."""
    made: dict[str, Path] = {}

    def of(recipe: Recipe) -> Path:
        if recipe.name.startswith("shapes"):
            return ROOT / "examples" / "shapes" / "model"
        kind = next((kind for kind in KINDS if kind in recipe.name), "")
        key = recipe.family + kind
        if key not in made:
            make = KINDS.get(kind, MODELS[recipe.family])
            made[key] = make(tmp_path_factory.mktemp(key))
        return made[key]

    return of


def tiny(recipe: Recipe) -> Recipe:
    """All of it but what is cut. Engines that buckets share need two of them."""
    shared = recipe.backend == "tensorrt_rtx"
    chosen = BUCKETS[recipe.family][: 2 if shared else 1]
    buckets = recipe.buckets if recipe.name.startswith("shapes") else tuple(map(Bucket.parse, chosen))
    sampling = dataclasses.replace(recipe.sampling, schedulers=("model",), step_counts=(STEPS,), steps=STEPS)
    drawn = recipe.calibration
    drawn = drawn and dataclasses.replace(drawn, prompts=drawn.prompts[:4], steps=STEPS)
    return dataclasses.replace(recipe, buckets=buckets, sampling=sampling, calibration=drawn)


def require_picture(bundle: toolchain.Bundle) -> None:
    """Neither black nor of one colour, and not what another prompt gives; and one that goes through the encoder."""
    pipe = toolchain.load(bundle.path)
    try:
        result = pipe("a red circle on a white background", seed=3)
        other = pipe("a blue square", seed=3)
        # At full strength, whose tables are those of a picture from noise.
        image = random_images(1, pipe.bundle.buckets[0].height, pipe.bundle.buckets[0].width)[0]
        began = pipe("a blue square", seed=3, image=image, strength=1.0)
    finally:
        pipe.close()
    for drawn in (result, began):
        assert np.isfinite(drawn.latents).all()
        assert np.asarray(drawn.images[0], np.float32).std() > 1
    assert not np.array_equal(np.asarray(result.images[0]), np.asarray(other.images[0]))


def require_precisions(bundle: toolchain.Bundle) -> None:
    """Every engine was asked for its recipe's type, and its builder's words do not deny it."""
    for component, entries in bundle.engines.items():
        wanted = bundle.recipe.component(component)
        for entry in entries.values():
            precision: Any = json.loads((bundle.path / entry.folder / "engine.json").read_text())["precision"]
            asked = precision["asked"]
            assert asked.keys() == {wanted.dtype} | ({"float32"} if wanted.keep_float32 else set()), component
            assert sum(map(len, precision["wide"].values())) <= sum(asked.values()) // 4


def require_executed(bundle: toolchain.Bundle) -> None:
    """All convolutions and products with weights in their recipe's type, those that are rounded in int8."""
    for component, entries in bundle.engines.items():
        for entry in entries.values():
            facts: Any = json.loads((bundle.path / entry.folder / "engine.json").read_text())
            kinds, precision = facts["layers"]["kinds"], facts["precision"]
            assert precision["named"] == sum(precision["asked"].values()), component
            weighted = [kinds[name] for name in ("Convolution", "FullyConnected") if name in kinds]
            assert weighted
            recipe, integer = bundle.recipe.component(component), facts["precision"].get("integer")
            rounded = recipe.quantize is not None and recipe.quantize.activations == "int8"
            assert (integer is not None) == rounded, component
            allowed = {recipe.dtype, *(["int8"] if rounded else [])}
            assert all(counts.keys() <= allowed for counts in weighted), component
            assert sum(counts.get("int8", 0) for counts in weighted) == (integer["asked"] if integer else 0)


def require_few_bits(bundle: toolchain.Bundle) -> None:
    """Every component that its recipe quantises has such weights, and no other has."""
    quantized = toolchain.api.inspect_bundle(bundle.path).quantized
    wanted = {name: c.quantize.weights for name, c in bundle.recipe.components.items() if c.quantize}
    assert {name: facts["type"] for name, facts in quantized.items()} == wanted
    assert all(facts["weights"] > 0 for facts in quantized.values())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_a_recipe(path: Path, models: Callable[[Recipe], Path], store: Path, tmp_path: Path, cache: Path) -> None:
    recipe = tiny(load_recipe(path))
    model = str(models(recipe))
    if recipe.backend == "tensorrt":
        with pretended(DIFFBUILD_CACHE=str(cache)) as trt:
            bundle = toolchain.build(recipe, model, tmp_path / "bundle", store=store, gate=False)
            require_precisions(bundle)
            require_few_bits(bundle)
            require_picture(bundle)
            assert trt.violations == []
    elif recipe.backend == "tensorrt_rtx":
        real_trt()
        bundle = toolchain.build(recipe, model, tmp_path / "bundle", store=store, gate=False)
        require_precisions(bundle)
        require_few_bits(bundle)
    else:
        if recipe.backend == "openvino" and not has_bfloat16():
            pytest.skip("this CPU has no bfloat16")
        bundle = toolchain.build(recipe, model, tmp_path / "bundle", store=store, gate=False)
        if recipe.backend == "openvino":
            require_precisions(bundle)
            require_executed(bundle)
        require_few_bits(bundle)
        require_picture(bundle)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_its_own_schedulers_and_steps_fit_the_model(path: Path, models: Callable[[Recipe], Path]) -> None:
    """Of which the builds above take one."""
    recipe = load_recipe(path)
    uncut = dataclasses.replace(recipe, buckets=tiny(recipe).buckets)
    assert toolchain.api.check_recipe_file(uncut, models(recipe)) == uncut
    wrong = "ddim" if recipe.family in ("sd3", "flux") else "flow-euler"
    sampling = dataclasses.replace(uncut.sampling, schedulers=(*uncut.sampling.schedulers, wrong))
    with pytest.raises(DiffbuildError, match=wrong):
        toolchain.api.check_recipe_file(dataclasses.replace(uncut, sampling=sampling), models(recipe))


STARTERS = {  # family, backend -> which shipped recipe is cut to it, and the denoiser's type
    ("sd", "onnxruntime"): ("shapes-fp32", "float32"),  # of the tiny model's size
    ("sd", "onnxruntime_cuda"): ("shapes-fp16", "float16"),
    ("sd", "tensorrt"): ("sd15-fp16-tensorrt", "float16"),
    ("sd", "tensorrt_rtx"): ("sd15-fp16-rtx", "float16"),
    ("sdxl", "onnxruntime"): ("sdxl-fp32", "float32"),
    ("sdxl", "onnxruntime_cuda"): ("sdxl-fp16", "float16"),
    ("sdxl", "tensorrt"): ("sdxl-fp16-tensorrt", "float16"),
    ("sdxl", "tensorrt_rtx"): ("sdxl-fp16-rtx", "float16"),
    ("sd3", "onnxruntime"): ("sd35-medium-fp16", "float32"),
    ("sd3", "onnxruntime_cuda"): ("sd35-medium-fp16", "float16"),
    ("sd3", "tensorrt"): ("sd35-medium-bf16-rtx", "bfloat16"),
    ("sd3", "tensorrt_rtx"): ("sd35-medium-bf16-rtx", "bfloat16"),
    ("flux", "onnxruntime"): ("flux1-dev-bf16", "float32"),
    ("flux", "onnxruntime_cuda"): ("flux1-dev-bf16", "float32"),  # it has no bfloat16
    ("flux", "tensorrt"): ("flux1-dev-bf16", "bfloat16"),
    ("flux", "tensorrt_rtx"): ("flux1-dev-bf16-rtx", "bfloat16"),
    ("flux1-schnell", "tensorrt"): ("flux1-schnell-bf16", "bfloat16"),
    ("flux1-schnell", "tensorrt_rtx"): ("flux1-schnell-bf16", "bfloat16"),
}


@pytest.mark.parametrize(("family", "backend"), STARTERS)
def test_a_first_recipe(family: str, backend: str, models: Callable[[Recipe], Path], tmp_path: Path) -> None:
    """`diffbuild init`, whose recipes are sound for the model that they are written for."""
    like, dtype = STARTERS[family, backend]
    schnell = family == "flux1-schnell"
    path = tmp_path / "first.toml"
    name = "flux1-schnell-bf16" if schnell else next(r.stem for r in RECIPES if load_recipe(r).family == family)
    model = models(dataclasses.replace(load_recipe(Path(name)), name=name))
    arguments = ["init", "--model", str(model), "--backend", backend, "-o", str(path), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["like"] == like
    made = load_recipe(path)
    side = 1024 if family.startswith("flux") else 64
    assert made.buckets == (Bucket(1, side, side),)
    assert (made.backend, made.component("denoiser").dtype) == (backend, dtype)
    assert {part.dtype for part in made.components.values()} <= {dtype, "float32"}
    if backend == "onnxruntime":
        limits = made.picture_limits["psnr_db"], made.check.components
        assert limits == (60.0, {}), "limits of another type were kept"
    assert toolchain.api.check_recipe_file(path, str(model)) == made
    assert CliRunner().invoke(cli, arguments).exit_code == 2, "a recipe was overwritten"


def test_a_first_recipe_leaves_out_what_the_model_lacks(models: Callable[[Recipe], Path], tmp_path: Path) -> None:
    model = Path(shutil.copytree(models(load_recipe(Path("sd35-medium-fp16"))), tmp_path / "model"))
    index = json.loads((model / "model_index.json").read_text())
    index |= {"text_encoder_3": [None, None], "tokenizer_3": [None, None]}
    (model / "model_index.json").write_text(json.dumps(index))
    path = tmp_path / "first.toml"
    done = CliRunner().invoke(cli, ["init", "--model", str(model), "--backend", "tensorrt_rtx", "-o", str(path)])
    assert done.exit_code == 0, done.output
    made = load_recipe(path)
    assert made.without == ("text_encoder_3",)
    assert "text_encoder_3" not in {*made.components, *made.check.components}


def test_the_backend_is_the_fastest_that_runs_here(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the others may run on the machine of the test, nor may it have a GPU."""
    runs = {"tensorrt_rtx", "onnxruntime_cuda", "onnxruntime"}
    for name, runner in RUNNERS.items():
        reason = lambda name=name: None if name in runs else "no"  # noqa: E731
        monkeypatch.setattr(runner, "available", reason, raising=False)
    found = []
    for name in ("tensorrt_rtx", "onnxruntime_cuda", "onnxruntime"):
        found.append(best_backend())
        runs.remove(name)
    assert found == ["tensorrt_rtx", "onnxruntime_cuda", "onnxruntime"]


def test_the_kinds_of_backend_are_all_here() -> None:
    """A recipe for another backend would be built above as if it were for the CPU."""
    kinds = {"onnxruntime", "openvino", "tensorrt", "tensorrt_rtx"}
    assert {load_recipe(path).backend for path in RECIPES} == kinds


def test_the_list_tells_what_is_quantised() -> None:
    lines = CliRunner().invoke(cli, ["recipes"]).stdout.splitlines()
    shown = {line.split()[0]: " ".join(line.split()[3:]) for line in lines}
    assert shown["shapes-fp32"] == "CPU float32"
    assert shown["shapes-int8w"] == "CPU float32 with int8"
    assert shown["flux1-dev-int4-rtx"].startswith("NVIDIA GPU bfloat16 with int4, text_encoder bfloat16")
