"""Brings along what a GPU machine without a package index lacks: wheels and a bundle, in pieces, call by call.

    python benchmarks/gpu_run/pack.py

Writes .gpu_run/call-1, call-2 ... , each small enough for one transfer, the most useful first, and prints the calls.
Wheels are for Python 3.12 on Linux x86-64, repacked without what nothing here uses, and compressed harder: that takes
ten minutes or more. Nothing is downloaded or built again that lies in .gpu_run/made.
"""

from __future__ import annotations

import argparse
import fnmatch
import hashlib
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks.gpu_run.packs import MANIFEST  # noqa: E402

PIECE_BYTES = 44_000_000
TRANSFER_BYTES = 64 << 20
MARGIN_BYTES = 2_000_000
"""For the manifest, and for what the working tree grows until it travels."""
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
FLAGS = ("--no-deps", "--only-binary=:all:", "--implementation", "cp")


@dataclass(frozen=True)
class Wheels:
    """A pack of wheels: requirements, and patterns of files that stay behind."""

    requirements: tuple[str, ...]
    without: tuple[str, ...] = ()


WHEELS = {
    "build": Wheels(("diffusers==0.42.0", "polygraphy==0.53.6", "importlib_metadata==10.2.0")),
    "rtx": Wheels(
        ("tensorrt-rtx-cu13-bindings==1.7.1.116", "onnxruntime-ep-nv-tensorrt-rtx-cu13==0.5.0"),
        ("*/libtensorrt_plugins.so", "*/libtensorrt_shim.so", "*/libonnxruntime_providers_*.so"),
    ),
    "onnxruntime_gpu": Wheels(("onnxruntime-gpu==1.31.1",), ("*_tensorrt.so", "onnxruntime/transformers/*")),
}
ORDER = ("build", "rtx", "rtx_bundle", "onnxruntime_gpu")
AFTER = {
    "": ("tests", "torch_steps"),
    "rtx_bundle": ("rtx",),
    "build": ("sd15", "sdxl"),
    "onnxruntime_gpu": ("tests", "shapes"),
}
"""Pack -> the parts that can say something new once it has come; the first ones need none. Without a backend, `sd15`
and `sdxl` make their models and graphs."""
LAST = ("sd15", "sdxl")
"""Parts that take a call of their own, after everything has come."""


def download(name: str, made: Path) -> Path:
    """The wheels of a pack as one archive."""
    archive = made / f"{name}.zip"
    if archive.exists():
        return archive
    wheels, wanted = made / name, WHEELS[name]
    platforms = [option for platform in PLATFORMS for option in ("--platform", platform)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *FLAGS, "--python-version", PYTHON, *platforms]
    subprocess.run([*command, "--dest", str(wheels), *wanted.requirements], check=True)
    beside = archive.with_suffix(".part")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_LZMA) as out:
        for wheel in sorted(wheels.glob("*.whl")):
            with zipfile.ZipFile(wheel) as source:
                for item in source.infolist():
                    if not any(fnmatch.fnmatch(item.filename, pattern) for pattern in wanted.without):
                        out.writestr(item.filename, source.read(item))
    beside.rename(archive)
    shutil.rmtree(wheels)
    return archive


def build_bundle(made: Path) -> Path:
    """The bundle of `shapes` for RTX and what it is to draw, as one archive."""
    from benchmarks.gpu_run import rtx
    from toolchain.recipe import load_recipe

    archive, folder = made / "rtx_bundle.zip", made / "rtx_bundle"
    if archive.exists():
        return archive
    shutil.rmtree(folder, ignore_errors=True)
    rtx.make(folder, load_recipe(rtx.RECIPE), rtx.MODEL, made / "store")
    beside = archive.with_suffix(".part")
    with zipfile.ZipFile(beside, "w", zipfile.ZIP_LZMA) as out:
        for path in sorted([folder / rtx.EXPECTED, *(folder / rtx.BUNDLE).rglob("*")]):
            if path.is_file():
                out.write(path, path.relative_to(folder))
    beside.rename(archive)
    return archive


def split(archives: dict[str, Path], packed: Path, room: int, piece_bytes: int) -> list[tuple[int, list[str]]]:
    """Writes call-1, call-2 ... with what fits into `room` bytes each, in order. (bytes, packs complete with it)."""
    for old in packed.glob("call-*"):
        shutil.rmtree(old)
    manifest: dict[str, Any] = {}
    calls: list[tuple[int, list[str]]] = [(0, [])]
    for name, archive in archives.items():
        pieces: list[dict[str, str]] = []
        with archive.open("rb") as file:
            while data := file.read(min(piece_bytes, room - calls[-1][0])):
                place = packed / f"call-{len(calls)}"
                place.mkdir(exist_ok=True, parents=True)
                piece = f"{archive.name}.{len(pieces) + 1:02}"
                (place / piece).write_bytes(data)
                pieces.append({"name": piece, "sha256": hashlib.sha256(data).hexdigest()})
                calls[-1] = (calls[-1][0] + len(data), calls[-1][1])
                if calls[-1][0] == room and file.tell() < archive.stat().st_size:
                    calls.append((0, []))
        manifest[name] = {"folder": "site" if name in WHEELS else name, "pieces": pieces}
        calls[-1][1].append(name)
        if calls[-1][0] == room:
            calls.append((0, []))
    if not calls[-1][0]:
        calls.pop()
    for number in range(1, len(calls) + 1):  # each brings the whole list, so that one knows what is still to come
        (packed / f"call-{number}" / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n")
    return calls


def tree_bytes() -> int:
    """Of the working tree that travels with every call."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    return sum((ROOT / name).stat().st_size for name in listed.split("\0") if name and (ROOT / name).is_file())


def call_lines(calls: Sequence[tuple[int, list[str]]]) -> Iterator[str]:
    """Each call: what travels with it and what runs."""
    for number, (nbytes, complete) in enumerate(calls, 1):
        parts = [*(AFTER[""] if number == 1 else ()), *(part for name in complete for part in AFTER.get(name, ()))]
        yield f"call {number}: carry [.gpu_run/call-{number}], {nbytes / 1e6:.0f} MB, timeout_s 600"
        yield f"    {_command(dict.fromkeys(parts)) if parts else 'true'}"
    for number, part in enumerate(LAST, len(calls) + 1):
        yield f"call {number}: carry nothing, timeout_s 600"
        yield f"    {_command([part])}"


def _command(parts: Iterable[str]) -> str:
    return f'PYTHONPATH=. python3 benchmarks/gpu_run/run.py --output "$OUT" --seconds 570 --parts {" ".join(parts)}'


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--packed", type=Path, default=ROOT / ".gpu_run")
    packed: Path = parser.parse_args().packed.absolute()
    made = packed / "made"
    made.mkdir(parents=True, exist_ok=True)
    archives = {}
    for name in ORDER:
        archives[name] = archive = download(name, made) if name in WHEELS else build_bundle(made)
        print(f"{name}: {archive.stat().st_size / 1e6:.0f} MB", file=sys.stderr)
    calls = split(archives, packed, TRANSFER_BYTES - tree_bytes() - MARGIN_BYTES, PIECE_BYTES)
    lines = "\n".join(call_lines(calls))
    (packed / "calls.txt").write_text(lines + "\n")
    print(lines)


if __name__ == "__main__":
    main()
