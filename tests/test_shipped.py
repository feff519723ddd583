"""Recipes by name: from a clone and from a wheel, listed, checked, and planned where their engines cannot be built."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import toolchain
from tests.test_cli import run, run_json
from toolchain.errors import EngineError, RecipeError
from toolchain.recipe import load_recipe, shipped

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "recipes").glob("*.toml"))


def test_names_are_those_of_the_files() -> None:
    assert shipped.names() == NAMES
    assert len(NAMES) >= 14
    for name in NAMES:
        assert load_recipe(Path(name)) == load_recipe(ROOT / "recipes" / f"{name}.toml")
        assert len(shipped.about(name)) > 20


def test_a_file_comes_before_a_name_and_a_folder_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bundle may be called as its recipe is."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sd15-fp32").mkdir()
    assert load_recipe(Path("sd15-fp32")).name == "sd15-fp32"
    (tmp_path / "sd15-fp32").rmdir()
    shutil.copy(ROOT / "recipes" / "sdxl-fp32.toml", tmp_path / "sd15-fp32")
    assert load_recipe(Path("sd15-fp32")).family == "sdxl"
    for no_name in ("./none/sd15-fp32", "sd15-fp32.toml"):
        with pytest.raises(RecipeError, match="did you mean 'sd15-fp32'"):
            load_recipe(Path(no_name))


def test_every_package_is_in_the_wheel() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "toolchain").rglob("__init__.py")}
    assert set(settings["packages"]) == found | {"diffbuild", "toolchain.recipes"}
    assert settings["package-dir"] == {"toolchain.recipes": "recipes"}


def test_a_wheel_holds_the_recipes(tmp_path: Path) -> None:
    """What setuptools puts into a wheel, without the index that an isolated build of one asks."""
    pytest.importorskip("setuptools", "77")
    source, built = tmp_path / "source", tmp_path / "built"
    for name in ("diffbuild", "toolchain", "recipes"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = ["-c", "import setuptools; setuptools.setup()", "-q", "build_py", "--build-lib", str(built)]
    subprocess.run([sys.executable, *command], cwd=source, check=True, capture_output=True)
    assert sorted(path.stem for path in (built / "toolchain" / "recipes").iterdir()) == NAMES
    assert all((built / name / "py.typed").exists() for name in ("diffbuild", "toolchain"))
    shutil.rmtree(source)
    script = "from toolchain.cli.main import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", script, "recipes", "--json"], cwd=built, capture_output=True, text=True
    )
    assert [recipe["name"] for recipe in json.loads(done.stdout)["recipes"]] == NAMES


def test_the_list_tells_what_each_is_for() -> None:
    listed = {recipe["name"]: recipe for recipe in run_json("recipes")["recipes"]}
    assert list(listed) == NAMES
    assert listed["sdxl-fp16-tensorrt"]["runs_on"] == "NVIDIA GPU"
    assert (listed["sd15-fp32"]["runs_on"], listed["sd15-fp32"]["family"]) == ("CPU", "sd")
    lines = [line.split() for line in run("recipes").stdout.splitlines()]
    assert ["sd15-fp32", "sd", "onnxruntime", "CPU", "float32"] in lines
    assert ["sd15-fp16-rtx", "sd", "tensorrt_rtx", "NVIDIA", "GPU", "float16"] in lines
    assert "float16, vae_decoder float32, vae_encoder float32" in run("recipes").stdout


# --- diffbuild recipe check -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_shipped_recipe_is_sound(name: str) -> None:
    """Whatever library is installed here."""
    assert run_json("recipe", "check", name)["recipe"]["name"] == name


def test_a_check_finds_what_the_file_alone_tells(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    text = (ROOT / "recipes" / "sd15-fp16-tensorrt.toml").read_text()
    path.write_text(text.replace("components.vae_decoder]", "components.vae]").replace('"unipc"]', '"unipcc"]'))
    said = run("recipe", "check", path, code=2).stderr
    assert "components.vae: unknown component" in said
    assert "no scheduler is called 'unipcc'" in said
    path.write_text(text.replace('family = "sd"', 'family = "sdd"'))
    assert "unknown family" in run("recipe", "check", path, code=1).stderr


def test_a_check_with_a_model_needs_its_configs_alone(tiny_copy: Path, tiny_recipe: Path) -> None:
    for file in tiny_copy.rglob("*.safetensors"):
        file.unlink()
    assert f"it fits {tiny_copy}" in run("recipe", "check", tiny_recipe, "--model", tiny_copy).stdout
    assert "another family" in run("recipe", "check", "sdxl-fp32", "--model", tiny_copy, code=1).stderr


# --- without the engines' library -------------------------------------------------------------------------------------


@pytest.fixture(params=["tensorrt", "tensorrt_rtx"])
def foreign(request: pytest.FixtureRequest, tiny_recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe whose backend has no library here."""
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    monkeypatch.setattr("toolchain.engines.tensorrt.library.find_spec", lambda name: None)
    path = tmp_path / "tiny.toml"
    path.write_text(f'backend = "{request.param}"\n{tiny_recipe.read_text()}')
    return path


def test_engines_of_a_missing_library_are_planned(foreign: Path, tiny_model: Path, tmp_path: Path) -> None:
    arguments = [foreign, "--model", tiny_model, "--store", tmp_path / "store"]
    document = run_json("plan", *arguments)
    assert document["device"] is None
    assert "cannot be imported" in document["refused"]["what"]
    assert "pip install 'diffbuild[" in document["refused"]["hint"]
    stages = {step["stage"]: step for step in document["steps"]}
    assert {"graph", "weights", "engine", "sampler", "tokenizer"} <= stages.keys()
    assert stages["engine"]["key"] is None
    assert stages["graph"]["key"]
    text = run("plan", *arguments).stdout
    assert "cannot be built here: TensorRT" in text
    assert text.count("  cannot be built here\n") == sum(step["stage"] == "engine" for step in document["steps"])


def test_they_are_not_built(foreign: Path, tiny_model: Path, tmp_path: Path) -> None:
    store, output = tmp_path / "store", tmp_path / "bundle"
    with pytest.raises(EngineError, match="cannot be imported"):
        toolchain.build(foreign, str(tiny_model), output, store=store)
    assert not output.exists()
    assert not (store / "tokenizer").exists(), "it was refused before anything was built"
