"""Quantised weights and activations in OpenVINO's engines: what is computed in which type, and the pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import toolchain
from tests.openvino_here import need_bfloat16
from tests.parity import Build, least_psnr_db
from tests.precision.test_engines import PLAIN
from tests.precision.test_int8 import CALIBRATION, INT8
from toolchain import api
from toolchain.cli.inspect import bundle_json
from toolchain.engines.layers import Layer
from toolchain.engines.openvino import build as module
from toolchain.errors import EngineError, RecipeError
from toolchain.store.facts import ENGINE_FACTS, read_facts

ON_OPENVINO = f'backend = "openvino"\n{PLAIN}'


def facts_of(bundle: toolchain.Bundle) -> dict[str, Any]:
    return read_facts(bundle.path / bundle.engine("denoiser", bundle.buckets[0]).folder / ENGINE_FACTS)


@pytest.mark.parametrize(
    ("family", "dtype"), [("sd", "float32"), ("flux", "float32"), pytest.param("sd", "bfloat16", marks=need_bfloat16)]
)
def test_rounded_products_are_computed_in_int8(
    family: str, dtype: str, build: Build, family_model: Callable[[str], Path]
) -> None:
    """39 dB for SD, in either type, and 45 for FLUX, from the float32 of the same backend."""
    folder = family_model(family)
    text = f'family = "{family}"\n{ON_OPENVINO}'
    plain = build(f"{family}-openvino", folder, text)
    typed = f'[components.denoiser]\ndtype = "{dtype}"\n'
    small = build(f"{family}-openvino-w8a8", folder, f'{text}{typed}{INT8}smoothing = 0.5\nscales = "mse"{CALIBRATION}')
    pictures = [pipe(["a red circle"] * 2, seed=[0, 1]).images for pipe in (plain, small)]
    psnr = least_psnr_db(*pictures)  # type: ignore[arg-type]
    assert 30 <= psnr < 90, psnr
    quantized = bundle_json(api.inspect_bundle(small.bundle.path))["quantized"]["denoiser"]
    precision = facts_of(small.bundle)["precision"]
    integer = precision["integer"]
    assert integer == {"asked": quantized["weights"], "wide": []}
    assert precision["named"] == sum(precision["asked"].values())
    assert integer["asked"] > 5


@pytest.mark.parametrize(("weights", "share"), [("int8", 0.7), ("int4", 0.95)])
def test_weights_alone_stay_narrow_in_products(
    weights: str, share: float, build: Build, family_model: Callable[[str], Path]
) -> None:
    """Products read them as they are stored and compute in float32; the engine file holds none of them."""
    folder = family_model("flux")
    text = f'family = "flux"\n{ON_OPENVINO}'
    plain = build("flux-openvino", folder, text)
    small = build(f"flux-openvino-{weights}", folder, f'{text}[components.denoiser.quantize]\nweights = "{weights}"\n')
    pictures = [pipe(["a red circle"] * 2, seed=[0, 1]).images for pipe in (plain, small)]
    assert 20 <= least_psnr_db(*pictures) < 90  # type: ignore[arg-type]
    facts = [facts_of(pipe.bundle) for pipe in (plain, small)]
    assert facts[1]["layers"]["kinds"]["FullyConnected"].keys() == {"float32"}
    assert facts[1]["packed_bytes"] < share * facts[0]["packed_bytes"]
    entries = [bundle.engine("denoiser", bundle.buckets[0]) for bundle in (plain.bundle, small.bundle)]
    sizes = [b.files[f"{e.folder}/model.blob"].size for b, e in zip((plain.bundle, small.bundle), entries, strict=True)]
    assert sizes[1] < 2 * sizes[0]


REFUSED = [
    ('weights = "float8"\n', "openvino has no products in float8 (expected int8 or int4)"),
    ('weights = "float8"\nactivations = "float8"\n', "openvino has no products in float8 (expected int8 or int4)"),
]


@pytest.mark.parametrize(("table", "message"), REFUSED)
def test_what_it_cannot_run_is_refused_while_planning(
    table: str, message: str, tiny_model: Path, store: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f'family = "sd"\n{ON_OPENVINO}[components.denoiser.quantize]\n{table}{CALIBRATION}')
    with pytest.raises(RecipeError) as error:
        api.plan_build(recipe, tiny_model, store=store)
    assert f"components.denoiser.quantize: {message}" in str(error.value)


def test_an_engine_that_widens_what_was_rounded_fails_its_build(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, store: Path, tmp_path: Path
) -> None:
    executed = module.executed_layers

    def widened(compiled: Any, graph: Any) -> list[Layer]:
        return [
            Layer(a.name, a.kind, frozenset({"float32"} if "int8" in a.dtypes else a.dtypes), a.nodes)
            for a in executed(compiled, graph)
        ]

    monkeypatch.setattr(module, "executed_layers", widened)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f'family = "sd"\n{ON_OPENVINO}{INT8}exclude = ["conv_out"]{CALIBRATION}')
    with pytest.raises(EngineError, match="does not compute in int8 what was quantised"):
        toolchain.build(recipe, str(tiny_model), tmp_path / "bundle", store=store, gate=False)


def test_a_cpu_without_vnni_is_warned_of(
    monkeypatch: pytest.MonkeyPatch, tiny_model: Path, store: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "saturates_int8", lambda: True)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(f'family = "sd"\n{ON_OPENVINO}{INT8}{CALIBRATION}')
    api.plan_build(recipe, tiny_model, store=store)
    assert "components.denoiser.quantize: this CPU has no VNNI" in caplog.text
