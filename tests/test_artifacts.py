"""The store: keys, publication, damage, clean-up, stamps, full and read-only disks, many processes."""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from toolchain.errors import StoreError
from toolchain.store import collect, files, manifest, stamps
from toolchain.store.artifacts import Artifact, Json, Store, content_key, file_digest, publish_folder, write_atomic

REPO = Path(__file__).parents[1]
INPUTS: dict[str, Json] = {"tool": {"torch": "2.13", "opset": 20}, "shape": [1, 4, 8, 8], "graph": "ab" * 32}


def fill(folder: Path) -> None:
    (folder / "nested" / "deep").mkdir(parents=True)
    (folder / "graph.onnx").write_bytes(bytes(range(100)))
    (folder / "nested" / "deep" / "weights.bin").write_bytes(b"w" * 50)
    (folder / "empty").write_bytes(b"")


def fail_build(folder: Path) -> None:
    raise AssertionError("a hit must not build")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def built(store: Store, stage: str = "export", subject: str = "unet", **changes: Json) -> Artifact:
    artifact, new = store.get_or_build(stage, subject, INPUTS | changes, fill)
    assert new
    return artifact


def age(path: Path, seconds: float) -> None:
    then = time.time() - seconds
    for each in (path, path / "manifest.json") if path.is_dir() else (path,):
        if each.exists():
            os.utime(each, (then, then))


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


def ref(artifact: Artifact) -> str:
    return f"{artifact.stage}/{artifact.key}"


# --- keys -------------------------------------------------------------------------------------------------------------


def test_key_is_frozen_and_ignores_the_order_of_names() -> None:
    # A changed literal means that every store in the world is rebuilt.
    assert content_key("s", {"a": 1}) == "d679ba869fa9fb5d0a9a50636ee75ae8ad6eeeaf3c423496feeee9fbb06dd64f"
    assert content_key("s", {"a": 1, "b": {"c": 2, "d": 3}}) == content_key("s", {"b": {"d": 3, "c": 2}, "a": 1})


@pytest.mark.parametrize(
    ("stage", "inputs"),
    [
        ("t", {"a": 1}),
        ("s", {"a": 2}),
        ("s", {"a": 1.0}),
        ("s", {"a": "1"}),
        ("s", {"a": True}),
        ("s", {"a": [1]}),
        ("s", {"b": 1}),
        ("s", {"a": 1, "b": None}),
        ("s", {}),
    ],
)
def test_key_changes_with_every_part(stage: str, inputs: dict[str, Json]) -> None:
    assert content_key(stage, inputs) != content_key("s", {"a": 1})


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), {1: 2}, [{None: 1}], Path("x"), b"x", {1}])
def test_key_refuses_what_json_cannot_hold(bad: object) -> None:
    with pytest.raises(StoreError, match="cannot make a key"):
        content_key("s", {"a": bad})  # type: ignore[dict-item]


# --- publish, look up -------------------------------------------------------------------------------------------------


def test_an_unused_store_creates_nothing(store: Store) -> None:
    assert store.lookup("export", "0" * 64) is None
    assert list(store.artifacts()) == []
    assert store.verify() == []
    assert store.explain("export", "unet", INPUTS) == []
    assert store.gc().removed == {}
    assert not store.root.exists()


def test_build_then_hit(store: Store) -> None:
    artifact = built(store)
    assert artifact.key == content_key("export", INPUTS)
    assert set(artifact.files) == {"graph.onnx", "nested/deep/weights.bin", "empty"}
    assert artifact.file("nested/deep/weights.bin").read_bytes() == b"w" * 50
    assert artifact.files["graph.onnx"].sha256 == file_digest(artifact.file("graph.onnx"))
    artifact.verify()
    assert store.get_or_build("export", "unet", INPUTS, fail_build) == (artifact, False)
    assert Store(store.root).lookup("export", artifact.key) == artifact
    assert list(store.artifacts()) == [artifact]
    assert names(store.root / ".tmp") == []


def test_manifest_says_what_it_is(store: Store) -> None:
    manifest = json.loads((built(store).path / "manifest.json").read_bytes())
    assert manifest["format"] == 1
    assert manifest["subject"] == "unet"
    assert manifest["inputs"] == INPUTS
    assert {"created", "versions", "stage", "key", "files", "digest"} < manifest.keys()


def test_published_folders_have_the_usual_permissions(store: Store, tmp_path: Path) -> None:
    (tmp_path / "usual").mkdir()
    assert built(store).path.stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_inputs_are_copied_before_the_build(store: Store) -> None:
    inputs: dict[str, Json] = {"a": [1]}

    def spoil(folder: Path) -> None:
        inputs["a"] = [2]

    artifact, _ = store.get_or_build("s", "x", inputs, spoil)
    assert artifact.inputs == {"a": [1]}


def test_foreign_names_in_the_store_are_ignored(store: Store) -> None:
    artifact = built(store)
    (store.root / "README.md").write_text("hello")
    (store.root / "export" / ".DS_Store").write_text("")
    (store.root / "export" / "notes").mkdir()
    (store.root / "Other").mkdir()
    assert list(store.artifacts()) == [artifact]
    assert store.verify() == []
    store.gc(min_age_s=0)
    assert (store.root / "README.md").exists()
    assert (store.root / "export" / "notes").exists()


def test_unknown_file_and_bad_names_are_refused(store: Store) -> None:
    with pytest.raises(StoreError, match=r"no such file(.|\n)*got: plan"):
        built(store).file("plan")
    for stage, key in [
        ("..", "0" * 64),
        (".tmp", "0" * 64),
        ("export", "../x"),
        ("Export", "0" * 64),
        ("a/b", "0" * 64),
    ]:
        with pytest.raises(StoreError, match="not the name of an artifact"):
            store.lookup(stage, key)


@pytest.mark.parametrize("error", [RuntimeError, FileNotFoundError, KeyboardInterrupt])
def test_a_build_that_raises_leaves_nothing(store: Store, error: type[BaseException]) -> None:
    def half(folder: Path) -> None:
        fill(folder)
        raise error("stop")

    with pytest.raises(error):
        store.get_or_build("export", "unet", INPUTS, half)
    assert names(store.root / ".tmp") == []
    assert not (store.root / "export").exists()
    built(store)


@pytest.mark.parametrize("make", [Path.symlink_to, Path.hardlink_to], ids=["symbolic", "hard"])
def test_links_are_not_published(store: Store, tmp_path: Path, make: Callable[[Path, Path], None]) -> None:
    (tmp_path / "weights").write_bytes(b"w")
    with pytest.raises(StoreError, match=r"cannot publish a/w(.|\n)*hint: copy"):
        store.get_or_build("s", "x", {}, lambda f: ((f / "a").mkdir(), make(f / "a" / "w", tmp_path / "weights"))[1])
    assert list(store.artifacts()) == []


def test_the_manifest_name_is_the_stores(store: Store) -> None:
    with pytest.raises(StoreError, match=r"manifest\.json"):
        store.get_or_build("s", "x", {}, lambda f: (f / "manifest.json").touch())


# --- damage -----------------------------------------------------------------------------------------------------------


def flip(path: Path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position] ^= 1 << (position % 8)
    path.write_bytes(data)


def rewrite(path: Path, change: Callable[[dict[str, Json]], object]) -> None:
    body = json.loads(path.read_bytes())
    change(body)
    path.write_text(json.dumps(body, indent=1, sort_keys=True) + "\n")


def test_every_flipped_byte_is_found(store: Store) -> None:
    artifact = built(store)
    flips = 0
    for name in [*artifact.files, "manifest.json"]:
        path = artifact.path / name
        good = path.read_bytes()
        for position in range(0, len(good), 3):
            flip(path, position)
            with pytest.raises(StoreError, match=name):
                artifact.verify()
            if name == "manifest.json":
                assert store.lookup("export", artifact.key) is None
            path.write_bytes(good)
            flips += 1
    artifact.verify()
    assert flips > 250


def test_every_truncation_and_growth_is_found_by_lookup(store: Store) -> None:
    artifact = built(store)
    for name in artifact.files.keys() | {"manifest.json"}:
        path = artifact.path / name
        good = path.read_bytes()
        for size in {*range(0, len(good), 7), max(0, len(good) - 1), len(good) + 1} - {len(good)}:
            path.write_bytes((good + b"\0")[:size])
            assert store.lookup("export", artifact.key) is None
            with pytest.raises(StoreError, match=name):
                artifact.verify()
        path.write_bytes(good)
    assert store.lookup("export", artifact.key) == artifact


DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing file": lambda p: (p / "graph.onnx").unlink(),
    "folder for a file": lambda p: ((p / "graph.onnx").unlink(), (p / "graph.onnx").mkdir()),
    "link for a file": lambda p: ((p / "graph.onnx").rename(p.parent / "x"), (p / "graph.onnx").symlink_to("../x")),
    "file for a folder": lambda p: (shutil.rmtree(p / "nested"), (p / "nested").touch()),
    "no manifest": lambda p: (p / "manifest.json").unlink(),
    "manifest is a folder": lambda p: ((p / "manifest.json").unlink(), (p / "manifest.json").mkdir()),
    "manifest not JSON": lambda p: (p / "manifest.json").write_text("{"),
    "manifest a list": lambda p: (p / "manifest.json").write_text("[]"),
    "manifest not text": lambda p: (p / "manifest.json").write_bytes(b"\xff\xfe\0"),
    "manifest nested": lambda p: (p / "manifest.json").write_text("[" * 100_000),
    "manifest huge number": lambda p: (p / "manifest.json").write_text('{"format": ' + "9" * 10_000 + "}"),
    "subject edited": lambda p: rewrite(p / "manifest.json", lambda b: b.update(subject="vae")),
    "inputs edited": lambda p: rewrite(p / "manifest.json", lambda b: b.update(inputs={})),
    "files edited": lambda p: rewrite(p / "manifest.json", lambda b: b.update(files={})),
    "newer format": lambda p: rewrite(p / "manifest.json", lambda b: b.update(format=2)),
    "white space": lambda p: (p / "manifest.json").write_bytes((p / "manifest.json").read_bytes() + b" "),
    "entry is a file": lambda p: (shutil.rmtree(p), p.touch()),
    "entry is empty": lambda p: (shutil.rmtree(p), p.mkdir()),
    "moved from another key": lambda p: (shutil.rmtree(p), shutil.copytree(built(Store(p.parents[1]), n=1).path, p)),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_counts_as_absent_and_is_rebuilt(store: Store, damage: str) -> None:
    artifact = built(store)
    DAMAGES[damage](artifact.path)
    assert store.lookup("export", artifact.key) is None
    assert len(store.verify()) >= 1
    with pytest.raises(StoreError):
        artifact.verify()
    rebuilt = built(store)
    rebuilt.verify()
    assert [n for n in names(store.root / ".quarantine") if artifact.key in n]  # set aside, not deleted


@pytest.mark.parametrize("name", ["extra", "nested/extra", ".hidden"])
def test_an_extra_file_is_found(store: Store, name: str) -> None:
    artifact = built(store)
    (artifact.path / name).write_text("")
    with pytest.raises(StoreError, match=f"{name}: is not in the manifest"):
        artifact.verify()


def test_a_manifest_with_escaping_names_is_refused(store: Store) -> None:
    artifact = built(store)
    path = artifact.path / "manifest.json"
    body = json.loads(path.read_bytes())
    del body["digest"]
    body["files"]["../../x"] = body["files"].pop("empty")
    path.write_bytes(manifest._encode(body))
    assert store.lookup("export", artifact.key) is None


def test_store_verify_lists_everything_and_quarantine_recovers(store: Store) -> None:
    good, flipped, broken = built(store), built(store, n=1), built(store, n=2)
    flip(flipped.file("graph.onnx"), 3)
    (broken.path / "manifest.json").write_text("")
    problems = {(p if isinstance(p, Path) else p.path): text for p, text in store.verify()}
    assert problems.keys() == {flipped.path, broken.path}
    assert problems[flipped.path] == "graph.onnx: has another content"
    assert store.lookup("export", flipped.key) is not None  # cheap: sizes only
    assert store.quarantine("export", flipped.key).exists()
    built(store, n=1).verify()
    good.verify()


def test_a_reader_that_runs_out_of_files_does_not_call_it_damage(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = built(store)

    def no_more(path: Path) -> bytes:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE), str(path))

    monkeypatch.setattr(Path, "read_bytes", no_more)
    with pytest.raises(StoreError, match="ulimit"):
        store.lookup("export", artifact.key)


# --- explain ----------------------------------------------------------------------------------------------------------


def test_explain_names_the_fields(store: Store) -> None:
    built(store)
    tool: Json = {"torch": "2.14", "onnx": "1.23"}
    changed = INPUTS | {"tool": tool, "shape": [2, 4, 8, 8], "graph": "ab" * 31 + "cd"}
    lines = [str(change) for change in store.explain("export", "unet", changed)]
    assert lines[0].startswith("graph: ...")
    assert lines[0].endswith('abcd"')
    assert lines[1:] == [
        "shape[0]: 1 -> 2",
        'tool.onnx: (absent) -> "1.23"',
        "tool.opset: 20 -> (absent)",
        'tool.torch: "2.13" -> "2.14"',
    ]


def test_explain_shortens_tells_types_apart_and_keeps_to_the_subject(store: Store) -> None:
    built(store, n=1)
    (line,) = map(str, store.explain("export", "unet", INPUTS | {"n": 1.0}))
    assert line == "n: 1 -> 1.0"
    (line,) = map(str, store.explain("export", "unet", INPUTS | {"n": "y" * 5000}))
    assert len(line) < 200
    assert store.explain("export", "vae", INPUTS) == []
    assert store.explain("engine", "unet", INPUTS) == []


def test_explain_compares_with_the_last_one_used(store: Store) -> None:
    first, second = built(store, n=1), built(store, n=2)
    age(first.path, 50)
    age(second.path, 100)
    assert [str(change) for change in store.explain("export", "unet", INPUTS | {"n": 3})] == ["n: 1 -> 3"]
    store.get_or_build("export", "unet", INPUTS | {"n": 2}, fail_build)
    assert [str(change) for change in store.explain("export", "unet", INPUTS | {"n": 3})] == ["n: 2 -> 3"]


# --- clean-up ---------------------------------------------------------------------------------------------------------


def bundle_of(tmp_path: Path, store: Store, *used: Artifact) -> Path:
    bundle = tmp_path / "bundle"
    bundle.mkdir()
    (bundle / "bundle.json").write_text("{}")
    store.register_bundle(bundle, [ref(a) for a in used])
    return bundle


def test_gc_keeps_what_a_bundle_needs_and_what_is_young(store: Store, tmp_path: Path) -> None:
    needed, unused, young = built(store, n=1), built(store, n=2), built(store, n=3)
    bundle = bundle_of(tmp_path, store, needed)
    for old in (needed, unused):
        age(old.path, 5000)
    dry = store.gc(dry_run=True)
    assert store.lookup("export", unused.key) is not None
    report = store.gc()
    assert report == dry
    assert report.removed.keys() == {ref(unused)}
    assert report.bytes_freed > 150
    assert report.kept == {ref(needed): f"part of {bundle}", ref(young): "used within the last 3600 s"}
    assert set(store.artifacts()) == {needed, young}


def test_gc_drops_a_vanished_bundle(store: Store, tmp_path: Path) -> None:
    needed = built(store)
    bundle = bundle_of(tmp_path, store, needed)
    (bundle / "bundle.json").unlink()
    assert store.gc(min_age_s=0, dry_run=True).dropped_bundles == (str(bundle),)
    assert store.gc(min_age_s=0).dropped_bundles == (str(bundle),)
    assert list(store.artifacts()) == []
    assert store.gc(min_age_s=0).dropped_bundles == ()


def test_registering_again_replaces_what_the_bundle_needs(store: Store, tmp_path: Path) -> None:
    old, new = built(store, n=1), built(store, n=2)
    bundle = bundle_of(tmp_path, store, old)
    store.register_bundle(bundle, [ref(new)])
    assert store.gc(min_age_s=0).removed.keys() == {ref(old)}


def test_registering_the_same_again_writes_nothing(store: Store, tmp_path: Path) -> None:
    artifact = built(store)
    bundle = bundle_of(tmp_path, store, artifact)
    before = (store.root / ".bundles.json").stat().st_mtime_ns
    store.register_bundle(bundle, [ref(artifact)])
    assert (store.root / ".bundles.json").stat().st_mtime_ns == before


def test_registering_refuses_what_is_no_reference(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="not the name of an artifact"):
        store.register_bundle(tmp_path, ["0" * 64])


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 2, "bundles": {}}', '{"format": 1, "bundles": {"a": 1}}']
)
def test_gc_removes_nothing_when_the_list_of_bundles_is_damaged(store: Store, content: str) -> None:
    artifact = built(store)
    (store.root / ".bundles.json").write_text(content)
    with pytest.raises(StoreError, match="list of bundles is damaged"):
        store.gc(min_age_s=0)
    artifact.verify()


def test_gc_removes_leftovers_but_not_of_a_running_build(store: Store) -> None:
    built(store)
    leftover = store.root / ".tmp" / ("1" * 64 + ".7.abc")
    leftover.mkdir(parents=True)
    (leftover / "half").write_bytes(b"h" * 10)
    (store.root / ".stamps").mkdir()
    partial = store.root / ".stamps" / ".x.7.abc.partial"
    partial.touch()
    assert store.gc().leftovers == {}
    age(leftover, 5000)
    age(partial, 5000)
    with files.locked(store.root / ".locks" / ("1" * 64), wait=True, purpose=""):
        assert store.gc().leftovers == {".stamps/.x.7.abc.partial": 0}
    assert store.gc().leftovers == {f".tmp/{leftover.name}": 10}
    assert not leftover.exists()


def test_gc_leaves_an_artifact_that_is_being_built(store: Store) -> None:
    artifact = built(store)
    with files.locked(store.root / ".locks" / artifact.key, wait=True, purpose=""):
        assert store.gc(min_age_s=0).kept == {ref(artifact): "being built"}


def test_gc_puts_back_what_is_reused_at_the_last_moment(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    artifact = built(store)
    age(artifact.path, 5000)
    real, calls = collect.age_s, []

    def reused_after_the_first_look(path: Path) -> float:
        seconds = real(path)
        if not calls:
            store.get_or_build("export", "unet", INPUTS, fail_build)
        calls.append(path)
        return seconds

    monkeypatch.setattr(collect, "age_s", reused_after_the_first_look)
    assert store.gc().removed == {}
    assert len(calls) == 2
    artifact.verify()


def test_gc_removes_damaged_and_quarantined_entries_when_old(store: Store) -> None:
    artifact = built(store)
    (artifact.path / "manifest.json").write_text("")
    age(artifact.path, 5000)
    built(store)
    assert store.gc().leftovers == {}  # evidence: its age counts from the quarantine
    (aside,) = (store.root / ".quarantine").iterdir()
    age(aside, 5000)
    assert len(store.gc().leftovers) == 1
    assert names(store.root / ".quarantine") == []


# --- stamps -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that were read for their digest; files count as settled at once."""
    seen: list[Path] = []

    def counted(path: Path) -> str:
        seen.append(path)
        return file_digest(path)

    monkeypatch.setattr(stamps, "file_digest", counted)
    monkeypatch.setattr(stamps, "_SETTLED_NS", -1)
    return seen


def test_a_stamped_file_is_read_once(store: Store, tmp_path: Path, reads: list[Path]) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a" * 1000)
    assert store.digest_of(path) == store.digest_of(path) == file_digest(path)
    assert len(reads) == 1
    before = path.stat()
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # size and mtime as before: ctime tells
    assert store.digest_of(path) == file_digest(path)
    replacement = tmp_path / "other"
    replacement.write_bytes(b"c" * 1000)
    replacement.replace(path)
    assert store.digest_of(path) == file_digest(path)
    assert len(reads) == 3


@pytest.mark.parametrize("content", [b"", b"\xff", b"0" * 64, b"0" * 64 + b" " + b"0" * 64, None])
def test_a_damaged_stamp_only_costs_time(
    store: Store, tmp_path: Path, reads: list[Path], content: bytes | None
) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"a")
    store.digest_of(path)
    (stamp,) = (store.root / ".stamps").iterdir()
    stamp.unlink() if content is None else stamp.write_bytes(content)
    assert store.digest_of(path) == file_digest(path)
    assert len(reads) == 2


def test_a_file_that_just_changed_is_not_stamped(store: Store, tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"a")
    store.digest_of(tmp_path / "weights")
    assert not (store.root / ".stamps").exists()


def test_digest_of_a_missing_file(store: Store, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="nowhere"):
        store.digest_of(tmp_path / "nowhere")


# --- folders and files outside the store ------------------------------------------------------------------------------


def version(number: int) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "bundle.json").write_text(str(number))
        (folder / "sub" / f"only_in_{number}").touch()

    return write


def owns(name: str) -> bool:
    """What `version` writes, of any number."""
    return name == "bundle.json" or name.startswith("sub/only_in_")


def test_publish_folder_creates_and_replaces(tmp_path: Path) -> None:
    target = tmp_path / "new" / "bundle"
    publish_folder(target, version(1))
    publish_folder(target, version(2), owns=owns)
    assert (target / "bundle.json").read_text() == "2"
    assert names(target / "sub") == ["only_in_2"]
    assert names(target.parent) == ["bundle"]


def test_publish_folder_keeps_the_old_one_when_filling_fails(tmp_path: Path) -> None:
    publish_folder(tmp_path / "bundle", version(1))

    def half(folder: Path) -> None:
        version(2)(folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        publish_folder(tmp_path / "bundle", half)
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "1"
    assert names(tmp_path) == ["bundle"]


def test_publish_folder_restores_the_old_one_when_the_rename_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    publish_folder(target, version(1))
    real = os.rename

    def rename(source: Path, destination: Path) -> None:
        if str(source).endswith(".new"):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        real(source, destination)

    monkeypatch.setattr(os, "rename", rename)
    with pytest.raises(StoreError, match="EIO"):
        publish_folder(target, version(2), owns=owns)
    assert (target / "bundle.json").read_text() == "1"
    assert names(tmp_path) == ["bundle"]


def test_publish_folder_recovers_from_a_crash_between_the_renames(tmp_path: Path) -> None:
    publish_folder(tmp_path / "bundle", version(1))
    (tmp_path / "bundle").rename(tmp_path / ".bundle.7.abc.old")
    (tmp_path / ".bundle.7.abc.new").mkdir()
    (tmp_path / ".bundle.x.7.abc.new").mkdir()  # of another target, "bundle.x"
    with pytest.raises(RuntimeError):
        publish_folder(tmp_path / "bundle", lambda f: (_ for _ in ()).throw(RuntimeError()))
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "1"
    assert names(tmp_path) == [".bundle.x.7.abc.new", "bundle"]


def test_publish_folder_does_not_disturb_another_publisher(tmp_path: Path) -> None:
    def outer(folder: Path) -> None:
        publish_folder(tmp_path / "bundle", version(1))
        version(2)(folder)

    publish_folder(tmp_path / "bundle", outer, owns=owns)
    assert (tmp_path / "bundle" / "bundle.json").read_text() == "2"
    assert names(tmp_path) == ["bundle"]


def test_publish_folder_refuses_to_replace_something_else(tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").touch()
    with pytest.raises(StoreError, match="refusing to replace"):
        publish_folder(tmp_path / "home", version(1))
    assert names(tmp_path / "home") == ["thesis.tex"]
    (tmp_path / "file").touch()
    for target in (tmp_path / "file", Path("/")):
        with pytest.raises(StoreError, match="expected: a folder or a free name"):
            publish_folder(target, version(1))
    (tmp_path / "empty").mkdir()
    publish_folder(tmp_path / "empty", version(1))


@pytest.mark.parametrize("name", ["notes.txt", "sub/notes.txt", "mine/deep/notes.txt"])
def test_publish_folder_keeps_files_of_somebody_else(tmp_path: Path, name: str) -> None:
    target = tmp_path / "bundle"
    publish_folder(target, version(1))
    (target / name).parent.mkdir(parents=True, exist_ok=True)
    (target / name).write_text("years of work")
    with pytest.raises(StoreError, match=f"refusing to replace(.|\n)*got: {name}(.|\n)*move them") as error:
        publish_folder(target, version(2), owns=owns)
    assert error.value.where == target
    assert (target / name).read_text() == "years of work"
    assert (target / "bundle.json").read_text() == "1"
    assert names(tmp_path) == ["bundle"]
    with pytest.raises(StoreError, match="sub/only_in_1"):
        publish_folder(target, version(2), owns=lambda other: other == name)
    publish_folder(target, version(2), owns=lambda _: True)
    assert names(target / "sub") == ["only_in_2"]


def test_owning_files_is_no_leave_to_replace_a_folder_of_others(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models" / "resnet.onnx").touch()
    with pytest.raises(StoreError, match="refusing to replace"):
        publish_folder(tmp_path / "models", version(1), owns=lambda name: name.endswith(".onnx"))
    assert names(tmp_path / "models") == ["resnet.onnx"]


def test_publish_folder_refuses_links(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="cannot publish link"):
        publish_folder(tmp_path / "bundle", lambda f: (f / "link").symlink_to("/etc/hostname"))
    assert names(tmp_path) == []


def test_write_atomic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a" / "b.json"
    write_atomic(path, b"1")
    write_atomic(path, b"22")
    assert path.read_bytes() == b"22"

    def full(fd: int, data: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StoreError, match=r"b\.json(.|\n)*MB are free at"):
        write_atomic(path, b"333")
    assert path.read_bytes() == b"22"
    assert names(path.parent) == ["b.json"]


# --- disks that refuse ------------------------------------------------------------------------------------------------


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of one megabyte of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount"):
        pytest.skip("there is no mount command")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], capture_output=True, text=True)
    if mounted.returncode:
        pytest.skip(f"mounting is not permitted: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_is_an_error_and_leaves_nothing(disk: Path) -> None:
    store = Store(disk / "store")
    small = built(store)
    ballast = disk / "ballast"

    def too_large(folder: Path) -> None:
        (folder / "engine").write_bytes(b"e" * 2_000_000)

    with pytest.raises(StoreError, match=r"No space left on device(.|\n)*hint: [0-9.]+ MB are free"):
        store.get_or_build("engine", "unet", {}, too_large)
    assert names(store.root / ".tmp") == []
    with ballast.open("wb") as stream, pytest.raises(OSError, match="No space"):
        stream.write(b"b" * 2_000_000)
    with pytest.raises(StoreError, match="No space left on device"):
        store.get_or_build("engine", "unet", {}, fill)
    with pytest.raises(StoreError, match="No space left on device"):
        publish_folder(disk / "bundle", version(1))
    assert list(store.artifacts()) == [small]
    assert store.get_or_build("export", "unet", INPUTS, fail_build) == (small, False)
    ballast.unlink()
    store.get_or_build("engine", "unet", {}, fill)[0].verify()


def test_a_full_disk_can_be_cleaned(disk: Path) -> None:
    store = Store(disk / "store")
    built(store)
    store.gc()
    with (disk / "ballast").open("wb") as stream, pytest.raises(OSError, match="No space"):
        stream.write(b"b" * 2_000_000)
    assert store.gc(min_age_s=0).bytes_freed > 0


def test_a_read_only_disk_serves_hits_and_refuses_the_rest(disk: Path) -> None:
    store = Store(disk / "store")
    artifact = built(store)
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    assert store.get_or_build("export", "unet", INPUTS, fail_build) == (artifact, False)
    assert store.digest_of(artifact.file("graph.onnx")) == artifact.files["graph.onnx"].sha256
    assert store.verify() == []
    for refused in (
        lambda: store.get_or_build("export", "vae", {}, fill),
        lambda: store.register_bundle(disk, [ref(artifact)]),
        lambda: store.gc(min_age_s=0),
        lambda: publish_folder(disk / "bundle", version(1)),
    ):
        with pytest.raises(StoreError, match=r"Read-only file system(.|\n)*hint: this path must be"):
            refused()


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="the superuser may write everywhere")
def test_no_permission(store: Store) -> None:
    store.root.mkdir()
    store.root.chmod(0o500)
    with pytest.raises(StoreError, match="Permission denied"):
        built(store)


def test_a_store_below_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = Store(tmp_path / "file" / "store")
    assert store.lookup("export", "0" * 64) is None
    with pytest.raises(StoreError, match=r"Not a directory(.|\n)*where: .*/file\n"):
        built(store)


# --- many processes ---------------------------------------------------------------------------------------------------

WORKER = """
import os, sys, time
from pathlib import Path
from toolchain.store.artifacts import Store
root, log, gate, seconds, *numbers = sys.argv[1:]
store = Store(Path(root))
def build(folder):
    (folder / "half").write_bytes(b"h" * 10000)
    fd = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, f"{number}\\n".encode())
    time.sleep(float(seconds))
    (folder / "rest").write_bytes(os.urandom(10000))
while not os.path.exists(gate):
    time.sleep(0.002)
for number in numbers:
    store.get_or_build("export", "unet", {"n": int(number)}, build)[0].verify()
    for artifact in store.artifacts():
        artifact.verify()
"""


def start(tmp_path: Path, seconds: float, *numbers: int) -> subprocess.Popen[bytes]:
    arguments = [tmp_path / "store", tmp_path / "log", tmp_path / "gate", seconds, *numbers]
    return subprocess.Popen(
        [sys.executable, "-c", WORKER, *map(str, arguments)], cwd=REPO, env=os.environ | {"PYTHONPATH": str(REPO)}
    )


def test_eight_processes_build_one_key_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, 0.3, 1) for _ in range(8)]
    (tmp_path / "gate").touch()
    assert [w.wait(30) for w in workers] == [0] * 8
    assert (tmp_path / "log").read_text().split() == ["1"]


def test_eight_processes_with_mixed_keys_build_each_once(tmp_path: Path) -> None:
    workers = [start(tmp_path, 0.01, *[(w * 3 + i) % 8 for i in range(8)]) for w in range(8)]
    (tmp_path / "gate").touch()
    assert [w.wait(30) for w in workers] == [0] * 8
    assert sorted((tmp_path / "log").read_text().split()) == [str(n) for n in range(8)]
    assert Store(tmp_path / "store").verify() == []


def test_threads_build_one_key_once(store: Store) -> None:
    count: list[Path] = []
    threads = [
        threading.Thread(
            target=lambda: store.get_or_build("s", "x", {}, lambda f: (count.append(f), time.sleep(0.1))[1])
        )
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(count) == 1


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_a_killed_builder_does_not_block_the_next(tmp_path: Path) -> None:
    (tmp_path / "gate").touch()
    worker = start(tmp_path, 60, 1)
    while not (tmp_path / "log").exists():
        time.sleep(0.01)
    store = Store(tmp_path / "store")
    assert store.lookup("export", content_key("export", {"n": 1})) is None
    assert store.gc(min_age_s=0).leftovers == {}
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    assert len(names(store.root / ".tmp")) == 1
    store.get_or_build("export", "unet", {"n": 1}, fill)[0].verify()
    assert names(store.root / ".tmp") == []


def test_waiting_says_for_whom(store: Store, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(files, "_TELL_AFTER_S", 0.1)
    waiter = threading.Thread(target=built, args=(store,))
    with (
        caplog.at_level(logging.INFO, "toolchain"),
        files.locked(store.root / ".locks" / content_key("export", INPUTS), wait=True, purpose=""),
    ):
        waiter.start()
        time.sleep(0.4)
    waiter.join()
    assert [r.getMessage() for r in caplog.records] == [f"waiting for process {os.getpid()}: it builds export unet"]
