"""Who built a bundle: an Ed25519 signature over `bundle.json`, which lists every file with its size and sha256.

The digests detect damage. An engine file is executable code, and somebody who rewrites it can rewrite its digest too:
only a signature protects against that. It lies beside the manifest, as JSON; any tool that knows Ed25519 can verify it.
`cryptography` is imported when a signature is made or verified, and not before.
"""

from __future__ import annotations

import base64
import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from toolchain.bundle.bundle import MANIFEST, SIGNATURE, Bundle, read_bundle
from toolchain.bundle.provenance import built_here
from toolchain.errors import BundleError, DiffbuildError, SignatureError, UsageError
from toolchain.store.files import store_errors, write_atomic

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

log = logging.getLogger("toolchain")

FORMAT = 1
TRUST = "DIFFBUILD_TRUST"
"""Names a public key: then no bundle is opened that it did not sign, whoever opens it."""
PASSWORD = "DIFFBUILD_KEY_PASSWORD"
NEW_PRIVATE = "openssl genpkey -algorithm ed25519 -out new-private.pem"
NEW_PUBLIC = "openssl pkey -in private.pem -pubout -out public.pem"


@dataclass(frozen=True)
class Signature:
    """The content of `bundle.sig`. The digests, in hex, prove nothing: they explain why a verification fails.

    key        sha256 of the signer's public key (DER)
    manifest   sha256 of the manifest that was signed
    signature  base64 of the 64 bytes
    """

    key: str
    manifest: str
    signature: str

    def refuse(self, manifest: bytes, key: Ed25519PublicKey) -> str | None:
        """Why this is not a signature of `manifest` by `key`; None where it is one."""
        from cryptography.exceptions import InvalidSignature

        if self.key != fingerprint(key):
            return f"it is signed by the key {self.key}, not by {fingerprint(key)}"
        try:
            key.verify(base64.b64decode(self.signature, validate=True), manifest)
        except (InvalidSignature, ValueError):
            changed = self.manifest != hashlib.sha256(manifest).hexdigest()
            return f"{MANIFEST} is not the one that was signed" if changed else "the signature is forged or damaged"
        return None


@dataclass(frozen=True)
class Verdict:
    """The result of `verify_bundle`. `problems` is empty when the bundle is unchanged and, with a key, signed by it.

    files      how many files the manifest lists
    signature  None for an unsigned bundle
    compared   fingerprint of the public key; None when no key was given
    """

    bundle: Path
    files: int
    signature: Signature | None
    compared: str | None
    problems: tuple[BundleError, ...]


def sign_bundle(path: str | Path, key: str | Path) -> Signature:
    """Verifies every file of a bundle, then signs its manifest with a private key, replacing an older signature.

    An encrypted key is opened with the password in $DIFFBUILD_KEY_PASSWORD. Raises UsageError for the key, BundleError
    for the bundle, StoreError when the disk refuses.
    """
    private = _private_key(Path(key))
    bundle = read_bundle(Path(path))
    bundle.verify()
    manifest = _read(bundle.path / MANIFEST)
    encoded = base64.b64encode(private.sign(manifest)).decode("ascii")
    signature = Signature(fingerprint(private.public_key()), hashlib.sha256(manifest).hexdigest(), encoded)
    text = json.dumps({"format": FORMAT, **asdict(signature)}, indent=1) + "\n"
    write_atomic(bundle.path / SIGNATURE, text.encode("ascii"))
    return signature


def verify_bundle(path: str | Path, key: str | Path | None = None) -> Verdict:
    """Compares every file with its size and sha256, then verifies the signature with a public key.

    The key is `key`, else $DIFFBUILD_TRUST; without either the signature is only shown. Problems are in the verdict.
    Raises UsageError for the key and BundleError where there is no bundle.
    """
    folder = Path(path)
    trusted = _trusted_key(key)
    problems: list[BundleError] = []
    files, signature = 0, None
    try:
        bundle = read_bundle(folder)
        files = len(bundle.files)
        problems += bundle.problems()
    except BundleError as error:
        if not (folder / MANIFEST).is_file():
            raise
        problems.append(error)
    try:
        signature = read_signature(folder)
        if trusted is not None:
            _require_signed(folder, trusted)
    except SignatureError as error:
        problems.append(error)
    return Verdict(folder, files, signature, None if trusted is None else fingerprint(trusted), tuple(problems))


def open_bundle(path: Path, *, verify: bool = True, trust: str | Path | None = None) -> Bundle:
    """Reads a bundle whose engines are about to run; `verify` compares its files with their digests.

    Engines that are machine code are verified in any case. Raises BundleError, what `require_trusted` raises, and
    UsageError for a trusted key without `verify`.
    """
    return admit(read_bundle(path), verify=verify, trust=trust)


def admit(bundle: Bundle, *, verify: bool = True, trust: str | Path | None = None) -> Bundle:
    """`open_bundle` for a bundle that was read already; returns it with `vouched` set. Raises the same errors."""
    if require_trusted(bundle, trust) and not verify:
        raise UsageError(
            "a signature says nothing of files that are not compared",
            expected=f"a comparison of every file, or no trusted key (trust, --trust or ${TRUST})",
            got="verify=False or --no-verify",
        )
    if verify:
        log.debug("comparing %d files of %s with their digests", len(bundle.files), bundle.path)
        bundle.verify()
    elif bundle.machine_code:
        bundle.verify_engines()
    return replace(bundle, vouched=True)


def require_trusted(bundle: Bundle, trust: str | Path | None = None) -> bool:
    """Verifies a bundle's signature with a public key, `trust` or $DIFFBUILD_TRUST; False when neither is given.

    Call it before any engine is opened, beside `Bundle.verify`: only the manifest is signed. Raises
    SignatureError for a bundle that the key did not sign or, without a key, for one whose engines are machine code and
    that was not built here; UsageError for a file that is no such key.
    """
    key = _trusted_key(trust)
    if key is not None:
        _require_signed(bundle.path, key, bundle.digest)
    elif bundle.machine_code and not built_here(bundle):
        raise SignatureError(
            "the bundle's engines are machine code, and nobody vouches for it",
            where=bundle.path,
            expected=f"a bundle that you built here, or one signed by a trusted key (trust, --trust or ${TRUST})",
            got="neither",
            hint=f"where it was built: diffbuild sign BUNDLE --key private.pem; here: {TRUST}=public.pem. If you built "
            "it here and the note is lost with the cache, build it once more: every step is a hit",
        )
    return key is not None


def vouch(bundle: Bundle) -> None:
    """The checks of `open_bundle` for engines of machine code, of a bundle that was read. Raises the same errors."""
    require_trusted(bundle)
    bundle.verify_engines()


def _trusted_key(path: str | Path | None) -> Ed25519PublicKey | None:
    # Set but empty is a mistake, and trusting everybody would hide it.
    named = os.environ.get(TRUST) if path is None else path
    return None if named is None else _public_key(Path(named))


def _require_signed(folder: Path, key: Ed25519PublicKey, digest: str | None = None) -> None:
    """SignatureError unless `key` signed the manifest; `digest` is that of the manifest that was read before."""
    signature, manifest = read_signature(folder), _read(folder / MANIFEST)
    if signature is None:
        got = "no signature"
    elif (reason := signature.refuse(manifest, key)) is not None:
        got = reason
    elif digest not in (None, hashlib.sha256(manifest).hexdigest()):
        got = f"{MANIFEST} was changed while it was read"
    else:
        return
    raise SignatureError(
        "the bundle is not signed by the trusted key",
        where=folder,
        expected=f"a signature by {fingerprint(key)}",
        got=got,
        hint="copy it again from where it was signed, or, if it is your own, diffbuild sign BUNDLE --key private.pem",
    )


def read_signature(folder: Path) -> Signature | None:
    """A bundle's signature, not verified; None for an unsigned bundle. SignatureError when it cannot be read."""
    path = folder / SIGNATURE
    if not os.path.lexists(path):
        return None
    try:
        data = json.loads(path.read_text(encoding="ascii"))
        if data.pop("format") != FORMAT or not all(isinstance(value, str) for value in data.values()):
            raise ValueError("another format")
        return Signature(**data)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise SignatureError(
            "the signature cannot be read",
            where=path,
            expected=f"JSON of format {FORMAT}",
            got=error,
            hint="diffbuild sign BUNDLE --key private.pem writes a new one",
        ) from error


def fingerprint(key: Ed25519PublicKey) -> str:
    """sha256, in hex, of the DER of a public key: openssl pkey -pubin -in public.pem -outform DER | sha256sum"""
    from cryptography.hazmat.primitives import serialization

    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _private_key(path: Path) -> Ed25519PrivateKey:
    _require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    data = _read_key(path, NEW_PRIVATE)
    password = os.environ.get(PASSWORD, "").encode() or None
    locked = b"ENCRYPTED" in data
    got: object
    try:
        key = serialization.load_pem_private_key(data, password if locked else None)
        if isinstance(key, Ed25519PrivateKey):
            return key
        got = type(key).__name__
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        if locked:
            got = "a wrong password" if password else "no password"
            hint = f"set {PASSWORD} in the environment"
            raise UsageError("the private key is encrypted", where=path, got=got, hint=hint) from None
        got = _kind(data) or error
    raise UsageError("not a private key", where=path, expected="an Ed25519 key in PEM form", got=got, hint=NEW_PRIVATE)


def _public_key(path: Path) -> Ed25519PublicKey:
    _require_library()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    data = _read_key(path, NEW_PUBLIC)
    got: object
    try:
        key = serialization.load_pem_public_key(data)
        if isinstance(key, Ed25519PublicKey):
            return key
        got = type(key).__name__
    except (ValueError, UnsupportedAlgorithm) as error:
        got = _kind(data) or error
    raise UsageError("not a public key", where=path, expected="an Ed25519 key in PEM form", got=got, hint=NEW_PUBLIC)


def _read_key(path: Path, hint: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UsageError("the key cannot be read", where=path, got=error.strerror, hint=hint) from None


def _kind(data: bytes) -> str | None:
    """The kind of object that a PEM file names; None for a file in another format."""
    if b"-----BEGIN " not in data:
        return "no PEM file"
    return data.split(b"-----BEGIN ")[1].partition(b"-----")[0].decode("ascii", "replace").lower()


def _read(path: Path) -> bytes:
    with store_errors("cannot read a file", path):
        return path.read_bytes()


def _require_library() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError as error:
        raise DiffbuildError(
            "signatures need cryptography, which is not installed", got=error, hint="pip install 'diffbuild[sign]'"
        ) from error
