"""First recipes for OpenVINO: from which shipped recipe they come, and in which types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

import toolchain
from toolchain.builder.starter import Starter, write_starter
from toolchain.cli.main import cli
from toolchain.engines.openvino.build import OpenVinoBuilder
from toolchain.models.hub import resolve_model
from toolchain.recipe import Bucket

FOR_CPU = """\
family = "sd"
backend = "openvino"
buckets = ["1x512x512"]

[components]
text_encoder = { dtype = "bfloat16" }
denoiser = { dtype = "bfloat16" }
vae_decoder = { dtype = "float32" }

[openvino]
pin_threads = false

[sampling]
guidance = 7.5

[check]
prompts = ["a"]
psnr_db = 30.0
"""


def started(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, bfloat16: bool, shipped: tuple[str, ...]
) -> Starter:
    """On a CPU with or without bfloat16, where only these recipes are shipped."""
    (tmp_path / "sd15-bf16-cpu.toml").write_text(FOR_CPU)
    names = [str(tmp_path / f"{name}.toml") if name == "sd15-bf16-cpu" else name for name in shipped]
    short = ("bfloat16",) if bfloat16 else ()
    refuses = lambda self, dtype, options: None if dtype in ("float32", *short) else "not here"  # noqa: E731
    monkeypatch.setattr(OpenVinoBuilder, "refuses_dtype", refuses)
    monkeypatch.setattr("toolchain.builder.starter.shipped.names", lambda: names)
    return write_starter(resolve_model(str(model)), "openvino", "first")


WITHOUT = ("sd15-fp16", "sd15-fp32", "sd15-fp16-tensorrt", "sdxl-fp16")
STARTS = [
    (True, (*WITHOUT, "sd15-bf16-cpu"), "sd15-bf16-cpu", "bfloat16", 30.0),
    (False, (*WITHOUT, "sd15-bf16-cpu"), "sd15-bf16-cpu", "float32", 0.0),
    (True, WITHOUT, "sd15-fp16", "bfloat16", 0.0),
    (False, WITHOUT, "sd15-fp32", "float32", 60.0),
]


@pytest.mark.parametrize(("bfloat16", "shipped", "like", "dtype", "psnr_db"), STARTS)
def test_types_are_those_of_the_cpu(
    bfloat16: bool,
    shipped: tuple[str, ...],
    like: str,
    dtype: str,
    psnr_db: float,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A recipe's own backend comes first. Limits that were found in other types are not kept."""
    starter = started(tiny_model, tmp_path, monkeypatch, bfloat16=bfloat16, shipped=shipped)
    made = starter.recipe
    assert (starter.like, made.backend, made.component("denoiser").dtype) == (like, "openvino", dtype)
    assert {part.dtype for part in made.components.values()} <= {dtype, "float32"}
    assert not any(part.keep_float32 for part in made.components.values())
    assert made.check.psnr_db == psnr_db
    assert made.openvino.pin_threads == (like != "sd15-bf16-cpu")
    assert made.buckets == (Bucket(1, 64, 64),)


def test_what_init_writes_is_built_and_draws(tiny_model: Path, tmp_path: Path, store: Path) -> None:
    """On the CPU of the test, whatever it can do."""
    recipe, bundle = tmp_path / "first.toml", tmp_path / "bundle"
    arguments = ["init", "--model", str(tiny_model), "--backend", "openvino", "-o", str(recipe), "--json"]
    done = CliRunner().invoke(cli, arguments)
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["backend"] == "openvino"
    arguments = ["build", str(recipe), "--model", str(tiny_model), "--output", str(bundle), "--store", str(store)]
    done = CliRunner().invoke(cli, [*arguments, "--no-gate"])
    assert done.exit_code == 0, done.output
    pipe = toolchain.load(bundle)
    assert pipe("a red circle", steps=2).images[0].size == (64, 64)
    pipe.close()
