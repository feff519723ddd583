"""What is said of the layers of OpenVINO's engines: `diffbuild inspect --engines` shows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from toolchain.store.facts import ENGINE_FACTS, read_facts


def layers(bundle: Path, engine: str) -> dict[str, Any]:
    found: dict[str, Any] = read_facts(bundle / "engines" / engine / ENGINE_FACTS)["layers"]
    return found


def test_attention_that_is_one_layer(openvino_bundle: Path) -> None:
    """The denoiser has eight; those of the text encoder are masked after the Softmax, which nothing fuses."""
    denoiser, text = layers(openvino_bundle, "denoiser/1x64x64"), layers(openvino_bundle, "text_encoder/any")
    assert denoiser["fused_attention"] == 8
    assert "Softmax" not in denoiser["kinds"]
    assert text["fused_attention"] == 0
    assert text["kinds"]["Softmax"] == {"float32": 2}


def test_bytes_that_are_no_numbers_are_not_int8(openvino_bundle: Path) -> None:
    """The mask of the text encoder is truth values in bytes, and the decoder ends in the bytes of pixels."""
    for engine in ("text_encoder/any", "denoiser/1x64x64", "vae_decoder/1x64x64"):
        kinds = layers(openvino_bundle, engine)["kinds"]
        assert all("int8" not in counts for counts in kinds.values()), kinds
    assert layers(openvino_bundle, "text_encoder/any")["kinds"]["Subgraph"]["other"] == 2
    assert layers(openvino_bundle, "vae_decoder/1x64x64")["kinds"]["Reorder"]["other"] >= 1
