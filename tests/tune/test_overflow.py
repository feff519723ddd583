"""Models made to leave the range of float16: the tuned recipe keeps just what overflows, and says how far it goes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from transformers import CLIPTextModel

from tests.test_cli import run, run_json
from tests.tiny import make_vae
from toolchain.engines.openvino.build import OpenVinoBuilder
from toolchain.models.hub import resolve_model
from toolchain.recipe import Recipe, load_recipe, parse_recipe
from toolchain.store.artifacts import Store
from toolchain.tune.budget import Budget
from toolchain.tune.pictures import Request
from toolchain.tune.result import Overflow
from toolchain.tune.run import Job
from toolchain.tune.run import tune as tune_job

WIDE = "decoder.mid_block.resnets.0"
TEXT = """
family = "sd"
buckets = ["1x64x64"]
[sampling]
scheduler = "euler"
steps = 3
step_counts = [3]
[check]
prompts = ["a red circle"]
psnr_db = 30.0
"""
DECODER = '[components.vae_decoder]\ndtype = "float16"\n'
ENCODERS = '[components.text_encoder]\ndtype = "float16"\n[components.vae_encoder]\ndtype = "float16"\n'


@pytest.fixture
def loud(tiny_copy: Path) -> Path:
    """A VAE whose decoder reaches 6e4 and more inside a block, where a norm follows: in float32 it changes nothing."""
    torch.manual_seed(0)
    vae = make_vae(4)
    weight = vae.decoder.mid_block.resnets[0].conv1.weight.data
    weight *= 6e4 / weight.abs().max()
    vae.save_pretrained(tiny_copy / "vae")
    return tiny_copy


def tune(text: str, model: Path, store: Path, folder: Path) -> dict[str, object]:
    (folder / "half.toml").write_text(text)
    given = ["tune", folder / "half.toml", "--model", model, "--store", store, "--output", folder / "whole.toml"]
    return run_json(*given, "--html", folder / "tune.html")


def test_what_overflows_stays_in_float32(loud: Path, store: Path, tmp_path: Path) -> None:
    document = tune(TEXT + DECODER, loud, store, tmp_path)
    (overflow,) = document["overflows"]  # type: ignore[misc]
    assert (overflow["component"], overflow["module"]) == ("vae_decoder", WIDE)
    assert overflow["largest"] > 65504
    assert overflow["kept"] == f'keep_float32 = ["{WIDE}"]'
    assert load_recipe(tmp_path / "whole.toml").component("vae_decoder").keep_float32 == (WIDE,)
    assert re.search(rf'^  "{re.escape(WIDE)}",  # values of up to \S+$', (tmp_path / "whole.toml").read_text(), re.M)
    assert "values of up to" in (tmp_path / "tune.html").read_text()
    for name, code in (("half", 3), ("whole", 0)):
        bundle = tmp_path / f"{name}-bundle"
        run("build", tmp_path / f"{name}.toml", "--model", loud, "--store", store, "--output", bundle)
        run("check", bundle, "--model", loud, "--store", store, code=code)


def test_what_the_recipe_keeps_already_is_no_news(loud: Path, store: Path, tmp_path: Path) -> None:
    document = tune(f'{TEXT}{DECODER}keep_float32 = ["decoder.mid_block"]\n', loud, store, tmp_path)
    assert document["overflows"] == []
    assert load_recipe(tmp_path / "whole.toml").component("vae_decoder").keep_float32 == ("decoder.mid_block",)


def test_a_residual_stream_takes_the_whole_component(tiny_copy: Path, store: Path, tmp_path: Path) -> None:
    model = CLIPTextModel.from_pretrained(tiny_copy / "text_encoder")
    with torch.no_grad():
        for layer in model.text_model.encoder.layers if hasattr(model, "text_model") else model.encoder.layers:
            layer.mlp.fc2.weight.mul_(6e4 / layer.mlp.fc2.weight.abs().max())
    model.save_pretrained(tiny_copy / "text_encoder")
    document = tune(TEXT + ENCODERS, tiny_copy, store, tmp_path)
    (overflow,) = document["overflows"]  # type: ignore[misc]
    assert (overflow["component"], overflow["module"]) == ("text_encoder", "")
    assert overflow["kept"] == 'dtype = "float32"'  # the backend's CPU kernels have no bfloat16
    recipe = load_recipe(tmp_path / "whole.toml")
    assert recipe.component("text_encoder").dtype == "float32"
    assert recipe.component("vae_encoder").dtype == "float16"
    assert re.search(r'^dtype = "float32"  # values of up to \S+$', (tmp_path / "whole.toml").read_text(), re.M)


def test_engines_for_another_machine_are_scanned_here(loud: Path, tmp_path: Path) -> None:
    document = tune(f'backend = "tensorrt"\n{TEXT}{DECODER}', loud, tmp_path / "store", tmp_path)
    assert [o["module"] for o in document["overflows"]] == [WIDE]  # type: ignore[attr-defined]


@pytest.mark.parametrize(("short", "wide"), [({"float16", "bfloat16"}, "bfloat16"), ({"float16"}, "float32")])
def test_what_is_kept_gets_a_type_that_the_device_has(
    short: set[str], wide: str, tiny_model: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenVINO has bfloat16, and a CPU may have float16 alone."""
    refuses = lambda self, dtype, options: None if dtype in {"float32", *short} else "not here"  # noqa: E731
    monkeypatch.setattr(OpenVinoBuilder, "refuses_dtype", refuses)
    given: list[str] = []

    def keep(recipe: Recipe, references: object, wide: str, progress: object) -> tuple[Recipe, list[Overflow]]:
        given.append(wide)
        return recipe, []

    monkeypatch.setattr("toolchain.tune.run.keep_whole", keep)
    recipe = parse_recipe('backend = "openvino"\n' + TEXT + DECODER, "tiny", "the test")
    source = resolve_model(str(tiny_model))
    tune_job(Job(recipe, source, Store(store), Budget({}), Request(("a",), (0,)), False, lambda text: None))
    assert given == [wide]
