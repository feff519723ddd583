"""The list of the bundles that keep artifacts alive, each with the artifacts that it was put together from."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from toolchain.errors import StoreError
from toolchain.store.files import store_errors, write_atomic
from toolchain.store.manifest import FORMAT, Json, canonical
from toolchain.store.tree import Tree


def read_bundle_list(tree: Tree) -> dict[str, list[str]]:
    """Bundle -> its artifacts, each "stage/key". StoreError for a damaged list."""
    path = tree.root / ".bundles.json"
    try:
        with store_errors("cannot read the list of bundles", path):
            raw = path.read_bytes() if path.exists() else b'{"format": 1, "bundles": {}}'
        listed = json.loads(raw)
        if listed["format"] != FORMAT or not all(isinstance(refs, list) for refs in listed["bundles"].values()):
            raise ValueError(raw[:40])
        return {str(bundle): [str(ref) for ref in refs] for bundle, refs in listed["bundles"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        # Taken as empty, it would let `gc` remove what the bundles need.
        raise StoreError(
            "the list of bundles is damaged", where=path, hint="delete the file, then build each bundle again"
        ) from error


def write_bundle_list(tree: Tree, bundles: Mapping[str, list[str]]) -> None:
    """Replaces the list in one step. StoreError."""
    listed: dict[str, Json] = {bundle: list(refs) for bundle, refs in bundles.items()}
    write_atomic(tree.root / ".bundles.json", canonical({"format": FORMAT, "bundles": listed}, indent=1) + b"\n")


def holds_bundle(bundle: str) -> bool:
    """Whether the bundle is still there; a folder that may not be read counts as there."""
    try:
        os.stat(os.path.join(bundle, "bundle.json"))
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True
