"""`diffbuild tune` from the command line on a tiny model, with ONNX Runtime's engines."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import toolchain
from tests.test_cli import run, run_json
from toolchain.recipe import Recipe, load_recipe
from toolchain.store.artifacts import Store
from toolchain.tune.limits import Checked
from toolchain.tune.references import References
from toolchain.tune.simulation import Simulation

RECIPE = """
family = "sd"
buckets = ["1x64x64", "2x64x64"]
[sampling]
scheduler = "euler"
steps = 3
step_counts = [3]
[check]
prompts = ["a red circle", "a blue square"]
[components.text_encoder.quantize]
weights = "int8"
[components.denoiser.quantize]
weights = "int8"
exclude = ["mid_block"]
[components.vae_decoder.quantize]
weights = "int8"
[components.vae_encoder.quantize]
weights = "int8"
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "whole.toml"
    path.write_text(RECIPE)
    return path


def arguments(recipe: Path, model: Path, store: Path, output: Path, *budgets: str) -> list[object]:
    limits = [part for budget in budgets for part in ("--budget", budget)]
    return ["tune", recipe, "--model", model, "--store", store, "--output", output, *limits]


@pytest.fixture(scope="module")
def tuned(recipe: Path, tiny_model: Path, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the recipe, the page and the document of one tuning."""
    folder = tmp_path_factory.mktemp("tuned")
    given = arguments(recipe, tiny_model, store, folder / "tuned.toml", "psnr_db>=58", "cosine>=0.999", "ssim>=0.99")
    document = run_json(*given, "--by", "block", "--html", folder / "tune.html")
    (folder / "tune.json").write_text(json.dumps(document))
    return folder


def test_the_tuned_recipe_keeps_the_budget(tuned: Path) -> None:
    document = json.loads((tuned / "tune.json").read_text())
    chosen = document["chosen"]
    assert document["budget"] == {"psnr_db": 58.0, "cosine": 0.999, "ssim": 0.99}
    for measured in (chosen, document["held_out"]):
        assert measured["psnr_db"] >= 58
        assert measured["cosine"] >= 0.999
    assert 0.3 < chosen["share"] <= document["points"][0]["share"]
    assert [p["share"] for p in document["points"]] == sorted((p["share"] for p in document["points"]), reverse=True)
    assert chosen in document["points"]
    # Those before it miss the budget, or did so with other seeds or against diffusers' pictures.
    assert document["points"][0]["psnr_db"] < 58
    assert chosen["excluded"] > 0
    assert document["alone"].keys() == {"text_encoder", "denoiser", "vae_decoder"}
    assert {(t["key"], t["value"]) for t in document["trials"]} == {("scales", "max"), ("scales", "mse")}


def test_every_exception_carries_its_number(tuned: Path) -> None:
    document, text = json.loads((tuned / "tune.json").read_text()), (tuned / "tuned.toml").read_text()
    recipe: Recipe = load_recipe(tuned / "tuned.toml")
    left = [(u["component"], u["pattern"]) for u in document["units"][: document["chosen"]["excluded"]]]
    assert left
    for component, pattern in left:
        table = recipe.component(component).quantize
        assert table is None or pattern in table.exclude
        if table is not None:
            assert re.search(
                rf'^  "{re.escape(pattern)}",  # \d+\.\d\d% of the error, \d+\.\d\d% of the work$', text, re.M
            )
    kept = recipe.component("denoiser").quantize
    assert kept is not None
    assert kept.exclude[0] == "mid_block"  # what the recipe excluded itself
    assert recipe.component("vae_encoder").quantize is not None
    assert recipe.check.psnr_db == 58
    assert text.startswith("# Tuned by diffbuild tune for ")
    assert "Budget psnr_db >= 58, cosine >= 0.999, ssim >= 0.99." in " ".join(text.replace("\n# ", " ").split())
    assert re.search(r'scales = "m\w+"  # error max \S+, mse \S+$', text, re.M)


def test_it_builds_from_the_store_and_passes_its_check(tuned: Path, tiny_model: Path, store: Path) -> None:
    document = run_json(
        "build", tuned / "tuned.toml", "--model", tiny_model, "--store", store, "--output", tuned / "bundle"
    )
    built = [step["stage"] for step in document["steps"] if step["result"] == "built"]
    assert built == ["gate"]  # the engines that were measured are those that ship
    run("check", tuned / "bundle", "--model", tiny_model, "--store", store)
    pipe = toolchain.load(tuned / "bundle")
    assert len(pipe("a red circle", seed=0).images) == 1
    pipe.close()


def test_the_page_shows_all_of_it(tuned: Path) -> None:
    page, document = (tuned / "tune.html").read_text(), json.loads((tuned / "tune.json").read_text())
    assert page.count("data:image/png") == 2 * 3
    assert page.count('class="bar') == len(document["units"])
    assert page.count('class="bar left"') == document["chosen"]["excluded"]
    assert "<script" not in page
    for unit in document["units"]:
        assert unit["pattern"] in page


def test_nothing_is_measured_twice(
    recipe: Path, tiny_model: Path, store: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another budget is another search over the same measurements."""

    def fail(self: References, name: str) -> Simulation:
        raise AssertionError(f"{name} is loaded again")

    monkeypatch.setattr(References, "simulation", fail)
    given = arguments(recipe, tiny_model, store, tmp_path / "again.toml", "psnr_db>=20", "cosine>=0.9")
    result = run(*given, "--by", "block")
    assert "chosen: 0 of" in result.stdout
    assert f"next: diffbuild build {tmp_path / 'again.toml'} --model {tiny_model} --output bundle" in result.stdout


def test_an_interrupted_tuning_goes_on(
    recipe: Path, tiny_model: Path, tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured: list[tuple[str, ...]] = []
    real = Simulation.error

    def counted(self: Simulation, weights: Any, *rest: Any) -> float:
        if len(measured) == 9:
            raise KeyboardInterrupt
        measured.append(tuple(weights))
        return real(self, weights, *rest)

    given = [
        *arguments(recipe, tiny_model, store, tmp_path / "t.toml", "psnr_db>=20"),
        "--by",
        "block",
        "--prompts",
        "1",
    ]
    monkeypatch.setattr(Simulation, "error", counted)
    assert "the same command goes on from here" in run(*given, code=130).output
    assert not (tmp_path / "t.toml").exists()
    first, kept = list(measured), {a.key for a in Store(store).artifacts() if a.stage == "tune"}
    measured.clear()
    monkeypatch.setattr(Simulation, "error", lambda *a: (measured.append(tuple(a[1])), real(*a))[1])
    run(*given)
    assert len(first) == 9
    assert measured
    assert not set(first[6:]) & set(measured)  # the first six are options, with everything quantised
    assert kept < {a.key for a in Store(store).artifacts() if a.stage == "tune"}


def test_a_budget_that_cannot_be_kept(recipe: Path, tiny_model: Path, store: Path, tuned: Path, tmp_path: Path) -> None:
    given = [*arguments(recipe, tiny_model, store, tmp_path / "t.toml", "psnr_db>=150", "cosine>=0.5"), "--by", "block"]
    document = run_json(*given, code=3)["error"]
    assert re.fullmatch(r"the budget cannot be kept with \d+% of the multiply-accumulates quantised", document["what"])
    assert document["where"] == "whole"
    assert document["expected"] == "psnr_db >= 150, cosine >= 0.5"
    assert re.match(r"psnr_db \d+\.?\d*, median_psnr_db .* quantised, the best of \d+ candidates$", document["got"])
    assert "exclude more in the recipe" in document["hint"]
    assert not (tmp_path / "t.toml").exists()


def test_what_the_check_misses_excludes_more(
    recipe: Path, tiny_model: Path, store: Path, tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every limit that is written is one that the recipe's own check keeps, SSIM too."""
    asked: list[str] = []

    def failing(recipe: Recipe, *_: Any) -> Checked:
        asked.append(recipe.name)
        return Checked((70.0,), (0.97,), {})

    monkeypatch.setattr("toolchain.tune.run.check", failing)
    given = arguments(recipe, tiny_model, store, tmp_path / "t.toml", "psnr_db>=30", "ssim>=0.98")
    document = run_json(*given, "--by", "block", code=3)["error"]
    assert len(asked) > 1
    last = r"with \d+ excluded, in the recipe's check, against diffusers, ssim 0\.97, at least 0\.98"
    assert re.fullmatch(last, document["got"])


PLAIN = RECIPE.split("[components", 1)[0]
NARROW = '[components.vae_decoder]\ndtype = "float16"\n'


@pytest.mark.parametrize(
    ("text", "more", "code", "said"),
    [
        (PLAIN, (), 2, "the recipe has nothing that could be tuned"),
        (PLAIN + NARROW, ("--budget", "psnr_db>=30"), 2, "a budget is given, and the recipe quantises nothing"),
        (PLAIN + NARROW, ("--budget", "psnr_db>=30"), 2, "hint: leave out --budget, and float16 alone is looked after"),
        (RECIPE, (), 2, "no budget is given"),
        (RECIPE, ("--budget", "speed>=2", "--budget", "lpips<=0.1"), 2, "speed is no metric"),
        (RECIPE.replace('"mid_block"', '"middle"'), ("--budget", "psnr_db>=30"), 2, "no module matches 'middle'"),
        ('backend = "tensorrt"\n' + RECIPE, ("--budget", "psnr_db>=30"), 1, "which cannot run here"),
    ],
)
def test_what_cannot_be_tuned_is_told_before_any_work(
    text: str, more: tuple[str, ...], code: int, said: str, tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "bad.toml").write_text(text)
    given = arguments(tmp_path / "bad.toml", tiny_model, tmp_path / "none", tmp_path / "new.toml")
    assert said in run(*given, *more, code=code).output
    assert not (tmp_path / "new.toml").exists()
    assert not list(Store(tmp_path / "none").artifacts())


def test_nothing_is_left_to_quantise(tiny_model: Path, store: Path, tmp_path: Path) -> None:
    text = f'{PLAIN}[components.vae_decoder.quantize]\nweights = "int8"\nexclude = ["decoder.*"]\n'
    (tmp_path / "bare.toml").write_text(text)
    given = arguments(tmp_path / "bare.toml", tiny_model, store, tmp_path / "new.toml", "psnr_db>=30")
    error = run_json(*given, code=2)["error"]
    assert error["what"] == "nothing is left that could be quantised"
    assert error["where"] == "bare: components.vae_decoder.quantize"
    assert not (tmp_path / "new.toml").exists()


def test_a_recipe_is_never_replaced(recipe: Path, tiny_model: Path, tmp_path: Path) -> None:
    given = arguments(recipe, tiny_model, tmp_path / "none", recipe, "psnr_db>=30")
    assert "the recipe file exists already" in run(*given, code=2).output
    given = arguments(recipe, tiny_model, tmp_path / "none", tmp_path / "new.toml", "psnr_db>=30")
    for page, said in ((recipe, "RECIPE and --html"), (tmp_path / "new.toml", "--output and --html")):
        assert f"{said} name the same file" in run(*given, "--html", page, code=2).output
    assert not (tmp_path / "new.toml").exists()
    assert recipe.read_text() == RECIPE
