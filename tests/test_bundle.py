"""What a bundle's manifest may say: every path stays inside and is listed, and every component serves every bucket."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import toolchain
from tests.manifests import edit_manifest
from toolchain.bundle.bundle import read_bundle
from toolchain.errors import BundleError
from toolchain.recipe import Bucket

Change = Callable[[dict[str, Any], str], object]
BUCKET = "1x64x64"


FIELDS: dict[str, Change] = {
    "files": lambda d, name: d["files"].update({name: {"sha256": "0" * 64, "size": 1}}),
    "engine folder": lambda d, name: d["engines"]["denoiser"][BUCKET].update(folder=name),
    "engine weights": lambda d, name: d["engines"]["denoiser"][BUCKET]["weights"].update(weights=name),
    "tokenizers": lambda d, name: d["tokenizers"].update(tokenizer=name),
    "samplers": lambda d, name: d["samplers"].update({"euler/4": name}),
}


@pytest.mark.parametrize("name", ["../x", "/etc/passwd", "engines/../../x", "out/x", "C:x", "a\\b"])
@pytest.mark.parametrize("field", FIELDS)
def test_no_path_leaves_the_bundle(bundle_copy: Path, field: str, name: str) -> None:
    outside = bundle_copy.with_name("outside")
    (outside / "x").mkdir(parents=True)
    (bundle_copy / "out").symlink_to(outside)
    edit_manifest(bundle_copy, lambda d: FIELDS[field](d, name))
    with pytest.raises(BundleError, match="leaves the bundle") as error:
        read_bundle(bundle_copy)
    assert error.value.got == name


@pytest.mark.parametrize("field", [f for f in FIELDS if f != "files"])
def test_nothing_is_used_that_is_not_listed(bundle_copy: Path, field: str) -> None:
    edit_manifest(bundle_copy, lambda d: FIELDS[field](d, "engines/other"))
    with pytest.raises(BundleError, match="list"):
        read_bundle(bundle_copy)


@pytest.mark.parametrize("folder", [f"engines/denoiser/{BUCKET}", "engines/text_encoder/any", "tokenizers/tokenizer"])
@pytest.mark.parametrize("name", ["more.bin", "deep/more.bin", "link"])
def test_a_folder_that_is_used_holds_listed_files_alone(bundle_copy: Path, folder: str, name: str) -> None:
    path = bundle_copy / folder / name
    path.parent.mkdir(exist_ok=True)
    if name == "link":
        path.symlink_to(bundle_copy.parent)
    else:
        path.write_text("x")
    with pytest.raises(BundleError, match="does not list") as error:
        read_bundle(bundle_copy)
    assert error.value.where == path
    path.unlink()
    read_bundle(bundle_copy)


def test_a_listed_file_that_is_gone_is_left_to_verify(bundle_copy: Path) -> None:
    (bundle_copy / "engines" / "denoiser" / BUCKET / "graph.onnx").unlink()
    with pytest.raises(BundleError, match="is missing"):
        read_bundle(bundle_copy).verify()


@pytest.mark.parametrize(
    ("change", "part"),
    [
        (lambda d: d["engines"].pop("denoiser"), "denoiser"),
        (lambda d: d["engines"].update(denoiser={}), "no bucket of the recipe"),
        (lambda d: d["engines"]["vae_decoder"].pop(BUCKET), f"engines.vae_decoder lacks {BUCKET}"),
        (lambda d: d["engines"].update(text_encoder={}), "engines.text_encoder lacks"),
        (lambda d: d["recipe"].update(buckets=["1x8x8"]), "no bucket of the recipe"),
        (lambda d: d.update(samplers=["a"]), "AttributeError"),
        (lambda d: d.update(tokenizers="a"), "AttributeError"),
    ],
)
def test_a_damaged_structure(bundle_copy: Path, change: Callable[[dict[str, Any]], object], part: str) -> None:
    edit_manifest(bundle_copy, change)
    with pytest.raises(BundleError, match=f"is damaged(.|\n)*{part}"):
        read_bundle(bundle_copy)


def test_a_missing_component(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda d: d["engines"].pop("text_encoder"))
    with pytest.raises(BundleError, match=r"no such engine(.|\n)*text_encoder 1x64x64"):
        read_bundle(bundle_copy).engine("text_encoder", Bucket.parse(BUCKET))


@pytest.mark.parametrize(
    ("guided", "embedded", "expected"), [(True, False, 5.0), (False, True, 5.0), (True, True, 5.0), (False, False, 1.0)]
)
def test_default_guidance(bundle_copy: Path, guided: bool, embedded: bool, expected: float) -> None:
    edit_manifest(bundle_copy, lambda d: d["recipe"].update(classifier_free_guidance=guided))
    edit_manifest(bundle_copy, lambda d: d["settings"].update(embedded_guidance=embedded))
    assert read_bundle(bundle_copy).default_guidance == expected


def test_buckets_come_in_the_order_of_the_recipe(bundle_copy: Path) -> None:
    edit_manifest(bundle_copy, lambda d: d["recipe"]["buckets"].reverse())
    assert [str(b) for b in read_bundle(bundle_copy).buckets] == ["2x64x96", BUCKET]
    edit_manifest(bundle_copy, lambda d: d["recipe"]["buckets"].insert(0, "1x8x8"))
    assert [str(b) for b in read_bundle(bundle_copy).buckets] == ["2x64x96", BUCKET]


def test_no_bit_of_the_manifest_can_change_unseen(bundle_copy: Path) -> None:
    path = bundle_copy / "bundle.json"
    raw = path.read_bytes()
    random = np.random.default_rng(0)
    for position, bit in zip(random.integers(0, len(raw), 400), random.integers(0, 8, 400), strict=True):
        damaged = bytearray(raw)
        damaged[position] ^= 1 << bit
        path.write_bytes(damaged)
        with pytest.raises(BundleError, match=r"bundle\.json|format"):
            read_bundle(bundle_copy)
    path.write_bytes(raw)
    read_bundle(bundle_copy).verify()


def as_snapshot(bundle: Path, repository: Path) -> Path:
    """As huggingface_hub keeps a download: the files by their digests, and a folder of links to them."""
    (repository / "blobs").mkdir(parents=True)
    snapshot = repository / "snapshots" / ("0" * 40)
    for path in [p for p in bundle.rglob("*") if p.is_file()]:
        blob = repository / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blob)
        link = snapshot / path.relative_to(bundle)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("writable", [True, False])
def test_a_snapshot_from_the_hub_opens(
    bundle_copy: Path, tmp_path: Path, writable: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """On a disk where no link can be made too, for more memory; neither leaves anything there."""

    def draw(bundle: Path) -> bytes:
        with closing(toolchain.load(bundle, open_buckets=1)) as pipe:
            picture: bytes = pipe("a red circle", seed=1, steps=4).images[0].tobytes()
        return picture

    def refuse(*_: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    expected = draw(bundle_copy)
    snapshot = as_snapshot(bundle_copy, tmp_path / "models--owner--name")
    (tmp_path / "current").symlink_to(snapshot)
    before = sorted(tmp_path.rglob("*"))
    if not writable:
        monkeypatch.setattr(os, "link", refuse)
    assert draw(tmp_path / "current") == expected
    assert ("holds a copy of its weights" in caplog.text) is not writable
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("target", ["elsewhere", "models--owner--name-2/blobs/x"])
def test_a_snapshot_s_links_end_in_its_repository(bundle_copy: Path, tmp_path: Path, target: str) -> None:
    snapshot = as_snapshot(bundle_copy, tmp_path / "models--owner--name")
    link = snapshot / "engines/denoiser/weights.safetensors"
    (tmp_path / target).parent.mkdir(parents=True, exist_ok=True)
    link.resolve().rename(tmp_path / target)
    link.unlink()
    link.symlink_to(tmp_path / target)
    with pytest.raises(BundleError, match="leaves the bundle"):
        read_bundle(snapshot)


def test_a_folder_of_links_without_a_snapshot_is_refused(bundle_copy: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(bundle_copy, tmp_path / "models--owner--name")
    others = snapshot.parent.rename(tmp_path / "models--owner--name" / "others")
    with pytest.raises(BundleError, match="leaves the bundle"):
        read_bundle(others / snapshot.name)


def test_a_file_of_a_snapshot_that_was_changed(bundle_copy: Path, tmp_path: Path) -> None:
    snapshot = as_snapshot(bundle_copy, tmp_path / "models--owner--name")
    bundle = read_bundle(snapshot)
    bundle.verify()
    blob = (snapshot / "engines/denoiser/weights.safetensors").resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"\x07")
    with pytest.raises(BundleError, match="was changed"):
        bundle.verify()
