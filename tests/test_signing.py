"""Signed bundles: what a key signed is run, and nothing else is where a key is trusted."""

from __future__ import annotations

import base64
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import toolchain
from tests.manifests import edit_manifest
from tests.test_cli import modules_after, run, run_json
from toolchain.bench.run import measure
from toolchain.bundle.bundle import read_bundle
from toolchain.bundle.signing import require_trusted
from toolchain.errors import BundleError, SignatureError, UsageError
from toolchain.runtime import pipeline

PROMPT = "a red circle"
ENGINE = "engines/denoiser/1x64x64/graph.onnx"


@dataclass(frozen=True)
class Keys:
    folder: Path
    private: Path
    public: Path


def write_pair(
    folder: Path, key: Ed25519PrivateKey | ec.EllipticCurvePrivateKey, password: bytes | None = None
) -> Keys:
    folder.mkdir()
    locked = serialization.NoEncryption() if password is None else serialization.BestAvailableEncryption(password)
    pem = serialization.Encoding.PEM
    keys = Keys(folder, folder / "private.pem", folder / "public.pem")
    keys.private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, locked))
    keys.public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    return keys


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return write_pair(tmp_path / "keys", Ed25519PrivateKey.generate())


@pytest.fixture
def others(tmp_path: Path) -> Keys:
    return write_pair(tmp_path / "others", Ed25519PrivateKey.generate())


@pytest.fixture
def signed(bundle_copy: Path, keys: Keys) -> Path:
    run("sign", bundle_copy, "--key", keys.private)
    return bundle_copy


@pytest.fixture(autouse=True)
def no_trust(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DIFFBUILD_TRUST", raising=False)


def test_a_signed_bundle_is_verified_and_drawn_with(signed: Path, keys: Keys, tmp_path: Path) -> None:
    document = run_json("verify", signed, "--key", keys.public)
    assert document["problems"] == []
    assert document["signed_by"] == document["compared_with"]
    assert f"signed by the key {document['signed_by']}" in run("verify", signed, "--key", keys.public).stdout
    assert "which was not verified" in run("verify", signed).stdout
    run("generate", signed, PROMPT, "--seed", 0, "--trust", keys.public, "-o", tmp_path / "a.png")
    moved = shutil.move(signed, tmp_path / "moved")
    toolchain.load(moved, trust=keys.public, warm_up=False).close()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="no openssl")
def test_others_can_compare_a_signature(signed: Path, keys: Keys, tmp_path: Path) -> None:
    data = json.loads((signed / "bundle.sig").read_text())
    (tmp_path / "raw").write_bytes(base64.b64decode(data["signature"]))
    files = ["-in", signed / "bundle.json", "-sigfile", tmp_path / "raw"]
    subprocess.run(["openssl", "pkeyutl", "-verify", "-pubin", "-inkey", keys.public, "-rawin", *files], check=True)


# --- what must not be run ---------------------------------------------------------------------------------------------


def rename_tool(bundle: Path) -> None:
    edit_manifest(bundle, lambda manifest: manifest["tools"].update(diffbuild="9"))


def rewrite_engine(bundle: Path) -> None:
    """What an attacker does: the manifest's digest is that of the new file."""
    import hashlib

    path = bundle / ENGINE
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    digest = hashlib.sha256(data).hexdigest()
    edit_manifest(bundle, lambda manifest: manifest["files"][ENGINE].update(sha256=digest))
    toolchain.read_bundle(bundle).verify()


def sign_other(bundle: Path) -> None:
    """The signature of another bundle by the same key, copied in."""
    keys = Keys(bundle, bundle.parent / "keys" / "private.pem", bundle)
    other = Path(shutil.copytree(bundle, bundle.with_name("other")))
    rename_tool(other)
    toolchain.sign_bundle(other, keys.private)
    shutil.copy(other / "bundle.sig", bundle / "bundle.sig")


def flip(bundle: Path) -> None:
    path = bundle / ENGINE
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def forge(bundle: Path) -> None:
    path = bundle / "bundle.sig"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "signature": base64.b64encode(bytes(64)).decode()}))


BUNDLES: dict[str, tuple[Callable[[Path], object], type[BundleError], str]] = {
    "unsigned": (lambda b: (b / "bundle.sig").unlink(), SignatureError, "no signature"),
    "tampered file": (flip, BundleError, "was changed"),
    "missing file": (lambda b: (b / ENGINE).unlink(), BundleError, "is missing"),
    "extra file": (lambda b: (b / ENGINE).with_name("x").write_text("x"), BundleError, "does not list"),
    "tampered manifest": (rename_tool, SignatureError, "bundle.json is not the one that was signed"),
    "tampered file and manifest": (rewrite_engine, SignatureError, "bundle.json is not the one that was signed"),
    "manifest cut off": (lambda b: (b / "bundle.json").write_text("{"), BundleError, "cannot be read"),
    "signature of another bundle": (sign_other, SignatureError, "bundle.json is not the one that was signed"),
    "signature forged": (forge, SignatureError, "forged or damaged"),
    "signature empty": (lambda b: (b / "bundle.sig").write_text(""), SignatureError, "cannot be read"),
    "signature no JSON": (lambda b: (b / "bundle.sig").write_bytes(b"\xff"), SignatureError, "cannot be read"),
    "signature too deep": (lambda b: (b / "bundle.sig").write_text("[" * 10**5), SignatureError, "cannot be read"),
    "signature of a newer format": (
        lambda b: (b / "bundle.sig").write_text('{"format": 2}'),
        SignatureError,
        "another format",
    ),
    "signature without a field": (lambda b: (b / "bundle.sig").write_text('{"format": 1}'), SignatureError, "key"),
    "signature a folder": (
        lambda b: ((b / "bundle.sig").unlink(), (b / "bundle.sig").mkdir()),
        SignatureError,
        "cannot be read",
    ),
}


@pytest.mark.parametrize("name", BUNDLES)
def test_bundles_that_are_not_what_was_signed(
    name: str, signed: Path, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damage, kind, part = BUNDLES[name]
    damage(signed)
    monkeypatch.setattr(pipeline, "Pipeline", lambda *_, **__: pytest.fail("engines were opened"))
    with pytest.raises(kind, match=part):
        toolchain.load(signed, trust=keys.public)
    monkeypatch.setenv("DIFFBUILD_TRUST", str(keys.public))
    with pytest.raises(kind, match=part):
        toolchain.load(signed)
    assert part in run("generate", signed, PROMPT, "-o", tmp_path / "a.png", code=1).stderr
    assert part in run("verify", signed, code=3).stdout
    assert part in json.dumps(run_json("verify", signed, code=3)["problems"])
    assert part in run("verify", signed, "--key", keys.public, code=3).stdout


def test_a_bundle_that_another_signed(signed: Path, others: Keys) -> None:
    with pytest.raises(SignatureError, match="not by"):
        toolchain.load(signed, trust=others.public)
    assert "signed by the key" in run("verify", signed, "--key", others.public, code=3).stdout


def test_a_signer_that_lies_about_the_key(signed: Path, others: Keys) -> None:
    path = signed / "bundle.sig"
    data = json.loads(path.read_text())
    toolchain.sign_bundle(signed, others.private)
    path.write_text(json.dumps({**data, "key": json.loads(path.read_text())["key"]}))
    with pytest.raises(SignatureError, match="forged or damaged"):
        toolchain.load(signed, trust=others.public)


KEYS: dict[str, tuple[Callable[[Keys], Path], str]] = {
    "missing": (lambda keys: keys.folder / "none.pem", "No such file"),
    "folder": (lambda keys: keys.folder, "cannot be read"),
    "other half": (lambda keys: keys.private, "private key"),
    "no PEM": (lambda keys: keys.folder / "text", "no PEM file"),
    "damaged": (lambda keys: keys.folder / "cut", "not a public key"),
    "of another kind": (lambda keys: keys.folder / "p256" / "public.pem", "ECP"),
}


@pytest.mark.parametrize("name", KEYS)
def test_keys_that_cannot_be_trusted(name: str, signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    (keys.folder / "text").write_text("a key")
    (keys.folder / "cut").write_bytes(keys.public.read_bytes().replace(b"M", b"A", 1))
    write_pair(keys.folder / "p256", ec.generate_private_key(ec.SECP256R1()))
    find, part = KEYS[name]
    with pytest.raises(UsageError, match=part) as error:
        toolchain.load(signed, trust=find(keys))
    assert error.value.where == find(keys)
    assert "openssl" in str(error.value.hint)
    assert part in run("verify", signed, "--key", find(keys), code=2).stderr
    monkeypatch.setenv("DIFFBUILD_TRUST", str(find(keys)))
    assert part in run("generate", signed, PROMPT, code=2).stderr


@pytest.mark.parametrize(
    ("key", "part"),
    [("none.pem", "No such file"), ("public.pem", "public key"), ("p256/private.pem", "ECP")],
)
def test_keys_that_cannot_sign(bundle_copy: Path, keys: Keys, key: str, part: str) -> None:
    write_pair(keys.folder / "p256", ec.generate_private_key(ec.SECP256R1()))
    assert part in run("sign", bundle_copy, "--key", keys.folder / key, code=2).stderr
    assert not (bundle_copy / "bundle.sig").exists()


def test_an_encrypted_key(bundle_copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = write_pair(tmp_path / "locked", Ed25519PrivateKey.generate(), b"secret")
    assert "no password" in run("sign", bundle_copy, "--key", keys.private, code=2).stderr
    monkeypatch.setenv("DIFFBUILD_KEY_PASSWORD", "guess")
    assert "a wrong password" in run("sign", bundle_copy, "--key", keys.private, code=2).stderr
    monkeypatch.setenv("DIFFBUILD_KEY_PASSWORD", "secret")
    run("sign", bundle_copy, "--key", keys.private)
    run("verify", bundle_copy, "--key", keys.public)


def test_a_damaged_bundle_is_not_signed(bundle_copy: Path, keys: Keys) -> None:
    flip(bundle_copy)
    assert "was changed" in run("sign", bundle_copy, "--key", keys.private, code=1).stderr
    assert not (bundle_copy / "bundle.sig").exists()


def test_trust_needs_the_files_compared(signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="not compared"):
        toolchain.load(signed, trust=keys.public, verify=False)
    monkeypatch.setenv("DIFFBUILD_TRUST", str(keys.public))
    assert "--no-verify" in run("generate", signed, PROMPT, "--no-verify", code=2).stderr


def test_the_environment_holds_for_all_who_open_engines(
    signed: Path, tiny_model: Path, keys: Keys, others: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFBUILD_TRUST", str(others.public))
    with pytest.raises(SignatureError):
        toolchain.check_bundle(signed, str(tiny_model))
    with pytest.raises(SignatureError):
        measure(signed)
    toolchain.load(signed, trust=keys.public, warm_up=False).close()
    monkeypatch.setenv("DIFFBUILD_TRUST", "")
    with pytest.raises(UsageError, match="cannot be read"):
        toolchain.load(signed)


# --- without a key ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["GPU", "NPU"])
def test_engines_of_openvino_for_no_cpu_may_be_machine_code(
    device: str, openvino_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those for a CPU are graphs, whoever built them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "somebody else's"))
    bundle = read_bundle(openvino_bundle)
    assert not bundle.machine_code
    assert require_trusted(bundle) is False
    recipe = replace(bundle.recipe, openvino=replace(bundle.recipe.openvino, device=device))
    with pytest.raises(SignatureError, match="machine code, and nobody vouches for it"):
        require_trusted(replace(bundle, recipe=recipe))


def test_verify_of_an_unsigned_bundle(bundle_copy: Path) -> None:
    text = run("verify", bundle_copy).stdout
    assert "unsigned" in text
    assert "all " in text
    assert run_json("verify", bundle_copy)["signed_by"] is None


def test_verify_names_every_damaged_file(bundle_copy: Path) -> None:
    (bundle_copy / ENGINE).unlink()
    (bundle_copy / "samplers" / "euler.json").write_text("{}")
    found = {Path(str(p["where"])).name for p in run_json("verify", bundle_copy, code=3)["problems"]}
    assert found == {"graph.onnx", "euler.json"}


def test_verify_of_no_bundle(tmp_path: Path) -> None:
    assert "not a bundle" in run("verify", tmp_path, code=1).stderr


def test_the_library_is_imported_when_trust_is_asked_for(signed: Path, keys: Keys, tmp_path: Path) -> None:
    arguments = ("generate", signed, PROMPT, "--seed", 0, "-o", tmp_path / "a.png")
    assert "cryptography" not in modules_after(*arguments)
    assert "cryptography" in modules_after(*arguments, "--trust", keys.public)
    assert "cryptography" not in modules_after("verify", signed)


def test_a_missing_library_names_the_extra(signed: Path, keys: Keys, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography", None)
    text = run("generate", signed, PROMPT, "--trust", keys.public, code=1).stderr
    assert "pip install 'diffbuild[sign]'" in text


# --- a build and its signature ----------------------------------------------------------------------------------------


def test_a_build_with_nothing_to_do_keeps_the_signature_and_a_new_bundle_has_none(
    tiny_recipe: Path, tiny_model: Path, store: Path, tiny_bundle: Path, keys: Keys, tmp_path: Path
) -> None:
    output = tmp_path / "bundle"
    toolchain.build(tiny_recipe, str(tiny_model), output, store=store)
    toolchain.sign_bundle(output, keys.private)
    arguments = ["build", "--model", tiny_model, "--store", store, "--output", output]
    assert "signed" not in run(*arguments, tiny_recipe).stderr
    toolchain.load(output, trust=keys.public, warm_up=False).close()
    changed = tmp_path / "changed.toml"
    changed.write_text(tiny_recipe.read_text().replace("guidance = 5.0", "guidance = 5.5"))
    assert changed.read_text() != tiny_recipe.read_text()
    assert "no longer signed" in run(*arguments, changed).stderr
    assert not (output / "bundle.sig").exists()
