"""Timing caches: found by version, GPU and level; shared by processes without losing what either measured."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from toolchain.engines.tensorrt.timing_cache import (
    merge_cache,
    only_builder,
    read_cache,
    timing_cache_path,
)
from toolchain.errors import StoreError
from toolchain.store.files import locked
from toolchain.store.user_cache import cache_folder


def union(there: bytes, mine: bytes) -> bytes:
    return b"".join(sorted({*there.splitlines(keepends=True), *mine.splitlines(keepends=True)}))


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DIFFBUILD_CACHE": "/c/own"}, "/c/own"),
        ({"XDG_CACHE_HOME": "/c/xdg"}, "/c/xdg/diffbuild"),
        ({"HOME": "/c/home"}, "/c/home/.cache/diffbuild"),
    ],
)
def test_where_caches_lie(variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("DIFFBUILD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cache_folder() == Path(expected)


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown() -> Path:
        raise RuntimeError("Could not determine home directory.")

    for name in ("DIFFBUILD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", unknown)
    with pytest.raises(StoreError, match="set DIFFBUILD_CACHE"):
        cache_folder()


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFBUILD_CACHE", str(tmp_path / "file"))
    with pytest.raises(StoreError, match="set DIFFBUILD_CACHE") as error, only_builder("uuid", "GPU"):
        pass
    assert str(tmp_path / "file") in str(error.value.where)


def test_a_cache_for_each_version_gpu_and_level() -> None:
    asked = [("11.4.0.106", "NVIDIA H200", 3), ("11.4.0.106", "NVIDIA H200", 4), ("11.4.0.106", "NVIDIA L40S", 3)]
    asked += [("10.16.1.11", "NVIDIA H200", 3), ("11.4.0.106", "../../NVIDIA H200", 3)]
    paths = [timing_cache_path(*a) for a in asked]
    assert len(set(paths)) == len(paths)
    assert {p.parent for p in paths} == {cache_folder() / "timing"}


PROCESS = """
import sys, time
from pathlib import Path
from toolchain.engines.tensorrt.timing_cache import merge_cache

def slow_union(there, mine):
    time.sleep(0.01)
    return b"".join(sorted({*there.splitlines(keepends=True), *mine.splitlines(keepends=True)}))

for i in range(25):
    merge_cache(Path(sys.argv[1]), f"{sys.argv[2]} {i}\\n".encode(), slow_union)
"""


def test_two_processes_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "timing" / "a.cache"
    both = [subprocess.Popen([sys.executable, "-c", PROCESS, str(path), name]) for name in ("one", "two")]
    assert [process.wait() for process in both] == [0, 0]
    assert set(read_cache(path).decode().splitlines()) == {f"{n} {i}" for n in ("one", "two") for i in range(25)}
    assert sorted(f.name for f in path.parent.iterdir()) == ["a.cache", "a.lock"]


def test_a_cache_that_cannot_be_joined_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    path.write_bytes(b"of another CUDA")
    merge_cache(path, b"mine", lambda there, mine: None)
    assert read_cache(path) == b"mine"


def test_a_merge_that_adds_nothing_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    merge_cache(path, b"a\n", union)
    before = path.stat().st_ino
    merge_cache(path, b"a\n", union)
    assert path.stat().st_ino == before


def test_no_cache_yet(tmp_path: Path) -> None:
    assert read_cache(tmp_path / "nowhere" / "a.cache") == b""


def test_a_cache_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.cache").mkdir()
    with pytest.raises(StoreError, match="cannot read the timing cache"):
        read_cache(tmp_path / "a.cache")


def test_the_lock_is_held_while_a_cache_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.cache"
    path.write_bytes(b"a\n")

    def combine(there: bytes, mine: bytes) -> bytes:
        with locked(path.with_suffix(".lock"), wait=False, purpose="") as free:
            assert not free
        return union(there, mine)

    merge_cache(path, b"b\n", combine)
    assert read_cache(path) == b"a\nb\n"
