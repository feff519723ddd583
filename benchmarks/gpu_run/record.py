"""What a part has measured so far, on disk after every stage of it, beside the machine that it was measured on."""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).absolute().parents[2]
FAKES = ROOT / "tests" / "fakes"
PACKAGES = (
    *("torch", "diffusers", "transformers", "numpy", "onnx-ir", "onnxruntime", "onnxruntime-gpu", "cuda-bindings"),
    *("nvidia-cudnn-cu13", "nvidia-cublas", "tensorrt", "tensorrt-rtx-cu13-bindings"),
)
RUNNING = "running"


def attempt(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except Exception as error:  # whatever it is, the result is to tell it
        traceback.print_exc()
        return {"error": f"{type(error).__name__}: {error}"}


def is_pretended() -> bool:
    """Whether the GPU is the stand-in of tests/fakes: then no number means anything."""
    return str(FAKES) in map(os.path.abspath, sys.path)


def facts() -> dict[str, Any]:
    """GPU, driver, processor and versions. A fact that cannot be had says why."""

    def machine() -> Any:
        from toolchain.engines.machine import machine

        return machine()

    def versions() -> Any:
        from toolchain.engines.machine import installed

        return installed(PACKAGES)

    return {"pretended": is_pretended(), "machine": attempt(machine), "versions": attempt(versions)}


class Record:
    """The JSON of one part. What is recorded is on disk, whole, when the call returns.

    state   "running" until whoever started the part says how it ended
    stages  name -> what was measured, or {"error": ...}, or {"skipped": ...}
    """

    def __init__(self, path: Path, part: str) -> None:
        self._path = path
        self.found: dict[str, Any] = {"part": part, "state": RUNNING, **facts(), "stages": {}}
        self.write()

    def __call__(self, stage: str, value: Any) -> None:
        self.found["stages"][stage] = value
        self.write()

    def stage(self, name: str, work: Callable[[], Any]) -> bool:
        """Records what `work` returns, or its error. Whether it went well."""
        self(name, {"running": True})
        value = attempt(work)
        self(name, value)
        return not (isinstance(value, dict) and "error" in value)

    def write(self) -> None:
        write_json(self._path, self.found)


def write_json(path: Path, value: Any) -> None:
    """Whoever reads the file, at whatever moment, finds the old or the new."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(json.dumps(value, indent=1, default=str) + "\n")
    os.replace(beside, path)
