"""The fake's plan: a magic number, a JSON header and the model, with its weights unless they were stripped."""

from __future__ import annotations

import hashlib
import json
import struct
from typing import Any

from tensorrt._enums import DataType
from tensorrt._graph import DTYPES, content_of, embed
from tensorrt._rules import VERSION, gpu

MAGIC = b"FAKEPLAN"
STRIPPABLE = {DataType.FLOAT, DataType.HALF, DataType.BF16, DataType.INT8, DataType.FP8}
STRIP_FROM_BYTES = 64  # what is smaller is a scalar or a shape, and stays


def strip(model: Any) -> dict[str, dict[str, Any]]:
    """Takes the weights out of a model, in place; name -> what a refit must bring back."""
    taken = {}
    for tensor in model.graph.initializer:
        content = content_of(tensor)
        if DTYPES.get(tensor.data_type) in STRIPPABLE and len(content) >= STRIP_FROM_BYTES:
            taken[tensor.name] = {"nbytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            embed(tensor, b"")
    return taken


def write(header: dict[str, Any], model: Any) -> bytes:
    body = model.SerializeToString()
    header = header | {"version": VERSION, "gpu": gpu(), "sha256": hashlib.sha256(body).hexdigest()}
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + len(body)) % 4)
    return MAGIC + struct.pack("<Q", len(text)) + text + body


def read(data: bytes, host_code: bool) -> tuple[dict[str, Any], bytes] | str:
    """Header and model, or why the runtime cannot take the plan, in its own words."""
    if data[: len(MAGIC)] != MAGIC or len(data) < 16:
        return "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (Serialization assertion magicTagRead == kMAGIC_TAG failed. Magic tag does not match)"  # noqa: E501
    (length,) = struct.unpack("<Q", data[8:16])
    try:
        header: dict[str, Any] = json.loads(data[16 : 16 + length])
    except ValueError:
        return "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (the engine plan file is corrupt)"
    if header["version_compatible"] and header["lean_runtime"] and not host_code:
        return (
            "IRuntime::deserializeCudaEngine: Error Code 3: API Usage Error (The engine holds a lean runtime; "
            "engine_host_code_allowed must be true to run it.)"
        )
    if not _fits_version(header):
        return (
            "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is not compatible "
            f"with this version of TensorRT, expecting library version {VERSION} got {header['version']}, "
            "please rebuild.)"
        )
    if not _runs_here(header):
        return (
            "IRuntime::deserializeCudaEngine: Error Code 6: API Usage Error (The engine plan file is generated on an "
            f"incompatible device, expecting {gpu()} got {header['gpu']}, please rebuild.)"
        )
    body = data[16 + length :]
    if hashlib.sha256(body).hexdigest() != header["sha256"]:
        return "IRuntime::deserializeCudaEngine: Error Code 1: Serialization (the engine plan file is corrupt)"
    return header, body


def _fits_version(header: dict[str, Any]) -> bool:
    theirs, ours = ([int(n) for n in v.split(".")] for v in (header["version"], VERSION))
    return theirs == ours or (header["version_compatible"] and theirs <= ours)


def _runs_here(header: dict[str, Any]) -> bool:
    level = header["compatibility"]
    if level == "AMPERE_PLUS":
        return True
    if level == "SAME_COMPUTE_CAPABILITY":
        return bool(header["gpu"].split("(")[-1] == gpu().split("(")[-1])
    return bool(header["gpu"] == gpu())
