"""What OpenVINO's engines are tied to, and what its devices can do here.

openvino is imported when it is used: `diffbuild doctor` must be able to say that it is missing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from toolchain.engines.cpu import cpu_architecture, cpu_features, cpu_flags
from toolchain.errors import EngineError

TELEMETRY = "openvino_telemetry"
EXTRA = "pip install 'diffbuild[openvino]'"
DECISIVE_FLAGS = ("avx_vnni", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_fp16", "amx_int8")
"""Beyond `cpu_features`, what of a CPU decides OpenVINO's choice of kernels, which a compiled model holds in part."""
INSTRUCTIONS = {"bfloat16": ("avx512_bf16", "amx_bf16"), "float16": ("avx512_fp16", "amx_fp16")}
"""On x86, one of these is what a type needs. OpenVINO takes AVX-512 alone for enough and widens every value then."""
CAPABILITIES = {"bfloat16": "BF16", "float16": "FP16"}


def installed_version() -> str:
    """The version of the package. EngineError where it is not installed."""
    try:
        return version("openvino")
    except PackageNotFoundError:
        raise EngineError("OpenVINO is not installed", hint=EXTRA) from None


@cache
def core() -> Any:
    """OpenVINO's `Core`, which finds the devices once. EngineError where the library cannot be loaded."""
    installed_version()
    try:
        with _unreported():
            import openvino

        return openvino.Core()
    except (ImportError, RuntimeError) as error:
        raise EngineError("OpenVINO cannot be loaded", got=error, hint=EXTRA) from error


@contextmanager
def _unreported() -> Iterator[None]:
    """Keeps OpenVINO, which is imported inside, from its package `openvino_telemetry`. With it, it reports each import
    and each conversion to Google Analytics, and leaves an identifier in the user's home. No option turns it off but a
    file there. A program that imported it before has decided for itself."""
    if "openvino" in sys.modules or TELEMETRY in sys.modules:
        yield
        return
    sys.modules[TELEMETRY] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[TELEMETRY]


@cache
def openvino_device() -> dict[str, Any]:
    """What engines built here are tied to: instruction set, version, and Intel's GPU and NPU where there are any.
    Raises EngineError without OpenVINO."""
    flags = [name for name in DECISIVE_FLAGS if name in cpu_flags()]
    others = {name.lower(): full_name(name) for name in ("GPU", "NPU") if has_device(name)}
    return {"kind": "cpu", "cpu": "+".join([cpu_features(), *flags]), "openvino": installed_version(), **others}


def has_device(name: str) -> bool:
    """Whether OpenVINO has a device of this kind here. Several of one kind are called "GPU.0", "GPU.1"."""
    return any(listed.split(".")[0] == name for listed in core().available_devices)


def full_name(name: str) -> str:
    """What a device calls itself."""
    return str(core().get_property(name, "FULL_DEVICE_NAME"))


def lacks(device: str, dtype: str) -> str | None:
    """Why a device cannot compute in a type here, or None. EngineError without OpenVINO, where flags do not tell."""
    if dtype == "float32":
        return None
    needed = INSTRUCTIONS[dtype]
    if device == "CPU" and cpu_architecture() == "x86_64" and not cpu_flags() & {*needed}:
        return f"this CPU has no {dtype} (none of {', '.join(needed)})"
    if not has_device(device):
        return None  # that there is no such device is said elsewhere
    if CAPABILITIES[dtype] not in core().get_property(device, "OPTIMIZATION_CAPABILITIES"):
        return f"OpenVINO has no {dtype} on this {device}"
    return None


def missing_device(device: str) -> EngineError:
    """For a device that is not there."""
    return EngineError(
        f"OpenVINO finds no {device} here",
        expected=" or ".join(core().available_devices),
        got=device,
        hint='set device = "CPU" in the recipe\'s table [openvino], or install the driver of the device',
    )
