"""What tells apart the models that ranges of activations may be of."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.store.artifacts import Json, Store, content_key
from toolchain.weights.safetensors import find_weights


def config_digest(config: Mapping[str, Json]) -> str:
    """Of a component's config, as `Planner.config` gives it: no range of the one serves another."""
    return content_key("config", {**config})


def weights_digest(store: Store, folder: Path) -> str:
    """Of a component's checkpoint. Errors of `find_weights`."""
    return content_key("checkpoint", {file.name: store.digest_of(file) for file in find_weights(folder)})
