"""Every call that changes or makes durable what is on disk fails once, in every way, and the store is never wrong.

Each operation is run in a forked process in which the k-th such call dies, fails, or is cut short, for every k until
the operation ends without reaching k. Then: what is visible is complete, an error is never reported as success, and the
next run recovers. tests/test_artifacts_faults.py runs this file, in a small process.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from toolchain.errors import StoreError
from toolchain.store import artifacts, bundles, collect, files, manifest, stamps, tree
from toolchain.store.artifacts import Json, Store, content_key, file_digest, publish_folder

CHANGING = ("open", "write", "fsync", "rename", "replace", "mkdir", "ftruncate")
REMOVING = ("unlink", "rmdir", "utime")  # only for crashes: a failing clean-up is no failure of what it follows
DONE, REFUSED, CRASHED, OTHER = 0, 1, 137, 99
# Calls that may fail without consequence, as (call, function of ours that makes it), each with the reason.
OPTIONAL = {
    ("write", "_acquire"),  # the process id in a lock file only serves a message
    ("ftruncate", "_acquire"),
    ("open", "temporary_folder"),  # the marks that tell a live temporary folder from a dead one
    ("open", "_parent_lock"),
    ("open", "_recover"),
}
OURS = {module.__file__ for module in (artifacts, bundles, collect, files, manifest, stamps, tree)}
INPUTS: dict[str, Json] = {"a": 1}
KEY = content_key("export", INPUTS)


class Injector:
    """Replaces the calls in this process; the `at`-th one (from 1) goes wrong in the given way."""

    def __init__(self, way: str, at: int) -> None:
        self.way, self.at, self.count = way, at, 0
        self.hit: tuple[str, str] | None = None
        for name in CHANGING + (REMOVING if way == "crash" else ()):
            setattr(os, name, self.wrap(name, getattr(os, name)))
        io.open = builtins.open = self.wrap("open", builtins.open)  # type: ignore[assignment]

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            caller = self.caller()
            if caller is None or (self.way in ("torn", "short") and name != "write"):
                return real(*args, **kwargs)
            self.count += 1
            if self.count != self.at:
                return real(*args, **kwargs)
            self.hit = (name, caller)
            if self.way in ("torn", "short"):
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
                if self.way == "short":
                    return len(args[1]) // 2
            if self.way in ("crash", "torn"):
                os._exit(CRASHED)
            raise OSError(getattr(errno, self.way), os.strerror(getattr(errno, self.way)))

        return call

    @staticmethod
    def caller() -> str | None:
        """The function of ours that makes the call, None when it is made by a clean-up (shutil) or by the test."""
        frame = sys._getframe(2)
        while frame.f_code.co_filename not in OURS:
            if frame.f_code.co_filename in (__file__, shutil.__file__) or frame.f_back is None:
                return None
            frame = frame.f_back
        # Looking up version numbers reads the installed packages, not the store.
        return None if frame.f_code.co_name == "_versions" else frame.f_code.co_name


def run_forked(operation: Callable[[], object], way: str, at: int) -> tuple[int, bool, bool]:
    """(exit code, whether the k-th call was reached, whether that call was optional)."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        code = OTHER
        try:
            os.close(reader)
            write = os.write
            injector = Injector(way, at)
            try:
                operation()
                code = DONE
            except StoreError:
                code = REFUSED
            if injector.hit:
                write(writer, b"optional" if injector.hit in OPTIONAL else b"needed")
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as stream:
        said = stream.read()
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, code == CRASHED or bool(said), said == b"optional"


@pytest.fixture
def root() -> Iterator[Path]:
    """In memory where that is possible: a real fsync makes these tests three times as long and no better."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else None) as folder:
        yield Path(folder)


def fill(folder: Path) -> None:
    (folder / "sub").mkdir()
    (folder / "bundle.json").write_bytes(b"b" * 100)
    (folder / "sub" / "engine").write_bytes(b"e" * 100)


def cover(
    root: Path, prepare: Callable[[Path], object], operate: Callable[[Path], object], check: Callable[[Path], object]
) -> int:
    """Runs every fault of every way; `check` must hold after each. Returns the number of faults."""
    points = 0
    for way in ("crash", "torn", "short", "ENOSPC", "EIO", "EMFILE", "EACCES"):
        for at in range(1, 1000):
            place = root / f"{way}{at}"
            place.mkdir()
            prepare(place)
            code, reached, optional = run_forked(lambda place=place: operate(place), way, at)
            what = f"{way} at call {at}: exit {code}"
            expected = {CRASHED} if way in ("crash", "torn") else {DONE} if optional or way == "short" else {REFUSED}
            assert code in (expected if reached else {DONE}), what
            check(place)
            if not reached:
                break
            points += 1
    print(f"{points} faults")
    return points


def all_visible_is_complete(place: Path) -> Store:
    store = Store(place / "store")
    for artifact in store.artifacts():
        artifact.verify()
    return store


def recovers(place: Path) -> None:
    store = all_visible_is_complete(place)
    artifact, _ = store.get_or_build("export", "unet", INPUTS, fill)
    artifact.verify()
    assert store.verify() == []
    assert not any((store.root / ".tmp").iterdir())


def build(place: Path) -> None:
    Store(place / "store").get_or_build("export", "unet", INPUTS, fill)


def damage(place: Path) -> None:
    build(place)
    (place / "store" / "export" / KEY / "sub" / "engine").write_bytes(b"")


def test_first_build(root: Path) -> None:
    assert cover(root, lambda place: None, build, recovers) > 100


def test_build_over_a_damaged_entry(root: Path) -> None:
    assert cover(root, damage, build, recovers) > 100


def test_hit(root: Path) -> None:
    """A fault while reading is an error, never a rebuild."""
    assert cover(root, build, build, recovers) >= 5


def test_register_bundle(root: Path) -> None:
    """The bundle that was registered before stays registered; so does the artifact that it needs."""

    def prepare(place: Path) -> None:
        build(place)
        (place / "bundle.json").touch()
        Store(place / "store").register_bundle(place, [f"export/{KEY}"])

    def check(place: Path) -> None:
        store = all_visible_is_complete(place)
        assert str(place) not in store.gc(min_age_s=-60).dropped_bundles
        assert store.lookup("export", KEY) is not None
        Store(place / "store").register_bundle(place / "other", [f"export/{'0' * 64}"])

    register = lambda place: Store(place / "store").register_bundle(place / "other", [f"export/{'0' * 64}"])  # noqa: E731
    assert cover(root, prepare, register, check) > 20


def test_gc(root: Path) -> None:
    """An artifact goes at once: the remains of a removal are never visible."""

    def check(place: Path) -> None:
        Store(place / "store").gc(min_age_s=-60)
        assert not any((place / "store" / ".tmp").iterdir())
        recovers(place)

    assert cover(root, build, lambda place: Store(place / "store").gc(min_age_s=-60), check) > 20


def test_quarantine(root: Path) -> None:
    operate = lambda place: Store(place / "store").quarantine("export", KEY)  # noqa: E731
    assert cover(root, build, operate, recovers) > 10


def test_publish_folder(root: Path) -> None:
    """A new bundle is there or not; after a crash the next publication leaves no litter."""

    def check(place: Path) -> None:
        bundle = place / "bundle"
        assert not bundle.exists() or whole(bundle) == 100
        publish_folder(bundle, fill)
        assert whole(bundle) == 100
        assert os.listdir(place) == ["bundle"]

    assert cover(root, lambda place: None, lambda place: publish_folder(place / "bundle", fill), check) > 50


def test_replacing_a_folder(root: Path) -> None:
    """The old bundle or the new one, never a mixture and never neither, once a publisher has looked again."""

    def old(folder: Path) -> None:
        (folder / "bundle.json").write_bytes(b"b" * 7)
        (folder / "sub").mkdir()
        (folder / "sub" / "engine").write_bytes(b"e" * 7)

    def fail(folder: Path) -> None:
        raise RuntimeError

    def check(place: Path) -> None:
        with pytest.raises(RuntimeError):
            publish_folder(place / "bundle", fail)
        assert whole(place / "bundle") in (7, 100)
        assert os.listdir(place) == ["bundle"]
        publish_folder(place / "bundle", fill)
        assert whole(place / "bundle") == 100

    def replace(place: Path) -> None:
        publish_folder(place / "bundle", fill)

    assert cover(root, lambda place: publish_folder(place / "bundle", old), replace, check) > 50


def whole(bundle: Path) -> int:
    """The size that both files of a bundle have."""
    (size,) = {path.stat().st_size for path in (bundle / "bundle.json", bundle / "sub" / "engine")}
    assert len(os.listdir(bundle)) == 2
    return size


def test_stamps(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stamps are a convenience: whatever fails, a digest that is returned is right."""
    monkeypatch.setattr(stamps, "_SETTLED_NS", -1)
    points = 0
    for way in ("crash", "torn", "ENOSPC", "EIO"):
        for at in range(1, 100):
            place = root / f"{way}{at}"
            place.mkdir()
            (place / "weights").write_bytes(b"w" * 1000)
            right = file_digest(place / "weights")

            def operate(place: Path = place, right: str = right) -> None:
                assert Store(place / "store").digest_of(place / "weights") == right

            code, reached, _ = run_forked(operate, way, at)
            assert code in (DONE, REFUSED, CRASHED), f"{way} at call {at}"
            operate()
            if not reached:
                break
            points += 1
    assert points > 20


def test_the_harness_notices_a_store_that_is_wrong(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Publishing in place, without a rename, must not pass: the proof that these tests can fail."""

    def in_place(self: Store, folder: Path, stage: str, subject: str, key: str, inputs: dict[str, Json]) -> None:
        final = self._tree.folder(stage, key)
        files.make_folder(final)
        files.write_new(final / "manifest.json", artifacts.manifest_of(folder, stage, subject, key, inputs))
        for name in ("sub/engine", "bundle.json"):
            files.make_folder((final / name).parent)
            files.write_new(final / name, b"?" * (folder / name).stat().st_size)

    monkeypatch.setattr(Store, "_publish", in_place)
    with pytest.raises(StoreError, match="another content"):
        cover(root, lambda place: None, build, recovers)
