"""What `inspect` tells of a bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from toolchain.bundle.bundle import read_bundle
from toolchain.bundle.inspection import Inspection
from toolchain.cli.inspect import bundle_json, bundle_lines


def test_every_size_of_every_encoder(tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three text encoders, one of them for longer prompts, and of the VAE's in both buckets."""
    monkeypatch.setenv("COLUMNS", "200")
    bundle = read_bundle(tiny_bundle)
    (entry,) = bundle.engines["text_encoder"].values()
    ids = entry.spec.inputs[0]
    long = replace(entry, spec=replace(entry.spec, inputs=(replace(ids, shape=(1, 256)), *entry.spec.inputs[1:])))
    engines = bundle.engines | {"text_encoder_2": {"any": entry}, "text_encoder_3": {"any": long}}
    tokenizers = dict.fromkeys(("text_encoder", "text_encoder_2", "text_encoder_3"), bundle.tokenizers["text_encoder"])
    several = replace(bundle, engines=engines, tokenizers=tokenizers)
    inspection = Inspection(several, None, False)
    lines = list(bundle_lines(inspection))
    told = "text_encoder 24 tokens, text_encoder_2 24 tokens, text_encoder_3 256 tokens"
    assert any(line.startswith("prompts") and told in line for line in lines)
    assert bundle_json(inspection)["prompts"] == {
        "text_encoder": 24,
        "text_encoder_2": 24,
        "text_encoder_3": 256,
    }
    sizes = next(line for line in lines if line.startswith("vae_encoder "))
    assert "1x64x64 " in sizes
    assert "2x64x96 " in sizes
    forecast = {line.split("  ")[1].strip() for line in lines if line.startswith("  ")}
    encoders = {"text_encoder", "text_encoder_2", "text_encoder_3", "vae_encoder 1x64x64", "vae_encoder 2x64x96"}
    assert encoders <= forecast
