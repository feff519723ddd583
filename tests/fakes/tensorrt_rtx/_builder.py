"""Building without a GPU: targets, the layers in the log, and what fails where there is no GPU."""

from __future__ import annotations

import json
import struct
from typing import Any

from tensorrt import _builder, _config, _plan
from tensorrt._engine import NAMES
from tensorrt._enums import _FLAGS_11, Severity, _enumeration
from tensorrt._interfaces import ILogger, Reporter
from tensorrt._network import INetworkDefinition

from tensorrt_rtx._rules import VERSION

BuilderFlag = _enumeration("BuilderFlag", **_FLAGS_11, REQUIRE_USER_ALLOCATION=28)
ComputeCapability = _enumeration(
    "ComputeCapability", NONE=0, CURRENT=1, SM75=75, SM80=80, SM86=86, SM89=89, SM120=120, SM121=121
)
NEEDS_GPU = ("STRIP_PLAN", "REFIT", "REFIT_IDENTICAL")
CHECK = "IBuilder::buildSerializedNetwork: Error Code 1: Myelin ([graph_jit.cpp:278] CHECK(status == CUDA_SUCCESS))"


class IBuilderConfig(_config.IBuilderConfig):
    def _set_defaults(self) -> None:
        super()._set_defaults()
        self._capabilities: list[Any] = []

    # Of the flags here and of those that the builder for both libraries asks for.
    def set_flag(self, flag: Any) -> None:
        self._flags |= 1 << int(flag)

    def clear_flag(self, flag: Any) -> None:
        self._flags &= ~(1 << int(flag))

    def get_flag(self, flag: Any) -> bool:
        return bool(self._flags >> int(flag) & 1)

    @property
    def num_compute_capabilities(self) -> int:
        return len(self._capabilities)

    @num_compute_capabilities.setter
    def num_compute_capabilities(self, value: int) -> None:
        self._capabilities = [ComputeCapability.NONE] * value

    def get_compute_capability(self, index: int) -> Any:
        return self._capabilities[index]

    def set_compute_capability(self, compute_capability: ComputeCapability, index: int) -> bool:
        if not 0 <= index < len(self._capabilities):
            return False
        self._capabilities[index] = compute_capability
        return True


class Builder(_builder.Builder):
    def __init__(self, logger: ILogger) -> None:
        self._report = Reporter(logger)
        self._max_threads = 1

    def create_builder_config(self) -> IBuilderConfig:
        config = IBuilderConfig._make(report=self._report)
        config._set_defaults()
        return config

    def _build(self, network: INetworkDefinition, config: Any) -> bytes | None:
        if any(config.get_flag(getattr(BuilderFlag, name)) for name in NEEDS_GPU):
            return self._report.error(CHECK)
        return super()._build(network, config)

    def _serialize(self, network: INetworkDefinition, config: Any, model: Any, layers: list[Any]) -> bytes:
        plan = super()._serialize(network, config, model, layers)
        (length,) = struct.unpack("<Q", plan[8:16])
        header = json.loads(plan[16 : 16 + length])
        targets = [int(c) for c in config._capabilities]
        self._report(Severity.INFO, f"Total Activation Memory: {header['memory']} bytes")
        if header["verbosity"] == "DETAILED":
            self._report(Severity.VERBOSE, "Layers:\n" + "\n".join(map(_line, header["layers"])))
        header |= {"targets": targets, "version": VERSION, "gpu": _plan.gpu()}
        text = json.dumps(header).encode()
        text += b" " * ((length - len(text)) % 4)  # a plan is handed out as floats
        return bytes(_plan.MAGIC + struct.pack("<Q", len(text)) + text + plan[16 + length :])


def _line(layer: dict[str, Any]) -> str:
    """As the builder's log describes a layer."""
    inputs, outputs = (
        ", ".join(f"{{ Name: {t['name']}, Dimensions: {t['shape']}, Datatype: {NAMES[t['dtype']]} }}" for t in side)
        for side in (layer["inputs"], layer["outputs"])
    )
    return (
        f"Name: {layer['name']}_myl0_0, LayerType: kgen, Inputs: [ {inputs}], Constants: [], Outputs: [ {outputs}], "
        f"TacticName: , StreamId: 0, Metadata: [ONNX Layer: {layer['name']}]"
    )
