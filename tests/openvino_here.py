"""OpenVINO as it is on this machine, and as if it were missing or on another one."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import metadata
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from toolchain.engines import machine
from toolchain.engines.cpu import cpu_flags
from toolchain.engines.openvino import device
from toolchain.errors import EngineError
from toolchain.weights.mapped import read_header


def has_bfloat16() -> bool:
    """Whether OpenVINO is here and the CPU computes in bfloat16."""
    try:
        return device.lacks("CPU", "bfloat16") is None
    except EngineError:
        return False


need_bfloat16 = pytest.mark.skipif(not has_bfloat16(), reason="this CPU has no bfloat16")
BFLOAT16 = pytest.param("bfloat16", marks=need_bfloat16)


def copied_weights(blob: Path, weights: Path) -> list[str]:
    """The weights of more than one axis that lie in an exported model: as they are, turned, or widened."""
    data, stored, copied = blob.read_bytes(), weights.read_bytes(), []
    for name, ref in read_header(weights).items():
        if len(ref.shape) < 2 or ref.nbytes < 256:
            continue
        kind = np.dtype(ml_dtypes.bfloat16 if ref.dtype == "BF16" else np.float32)
        array = np.frombuffer(stored, kind, ref.nbytes // kind.itemsize, ref.offset).reshape(ref.shape)
        forms = (array, array.T, array.astype(np.float32), array.T.astype(np.float32))
        if any(form.tobytes() in data for form in forms):
            copied.append(name)
    return copied


class FakeCore:
    """Of an OpenVINO that has these devices, which can all do the same."""

    def __init__(self, devices: Iterable[str], capabilities: Iterable[str] = ()) -> None:
        self.available_devices = list(devices)
        self._capabilities = list(capabilities)

    def get_property(self, name: str, key: str) -> object:
        return self._capabilities if key == "OPTIMIZATION_CAPABILITIES" else f"Intel {name}"


@pytest.fixture
def forget(monkeypatch: pytest.MonkeyPatch) -> Iterable[pytest.MonkeyPatch]:
    """A monkeypatch around which nothing is remembered of the library and the device."""
    caches = (device.core, device.openvino_device)
    for cached in caches:
        cached.cache_clear()
    with monkeypatch.context() as patch:
        yield patch
    for cached in caches:
        cached.cache_clear()


def remove_openvino(patch: pytest.MonkeyPatch) -> None:
    """As if the package were not installed. `patch` is the fixture `forget`."""
    pretend_version(patch, None)
    patch.setitem(sys.modules, "openvino", None)


def pretend_version(patch: pytest.MonkeyPatch, number: str | None) -> None:
    """As if this version were installed, None: none."""

    def version(name: str) -> str:
        if name != "openvino":
            return metadata.version(name)
        if number is None:
            raise PackageNotFoundError(name)
        return number

    patch.setattr(device, "version", version)
    patch.setattr(machine, "version", version)


def pretend_cpu(patch: pytest.MonkeyPatch, *, without: Iterable[str]) -> None:
    """As if the CPU had none of these instructions."""
    flags = cpu_flags() - {*without}
    patch.setattr(device, "cpu_flags", lambda: flags)
