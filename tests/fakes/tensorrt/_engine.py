"""Runtime, engines, contexts: a plan is run on host memory, in the order of the fake CUDA streams."""

from __future__ import annotations

import json
import weakref
from typing import Any

from tensorrt import _plan
from tensorrt._context import IExecutionContext
from tensorrt._enums import (
    DataType,
    EngineStat,
    ExecutionContextAllocationStrategy,
    HardwareCompatibilityLevel,
    LayerInformationFormat,
    ProfilingVerbosity,
    SerializationFlag,
    TensorFormat,
    TensorIOMode,
    TensorLocation,
)
from tensorrt._graph import Executable, load_proto
from tensorrt._interfaces import Buffer, Dims, IErrorRecorder, IHostMemory, ILogger, Reporter, without_device
from tensorrt._rules import Made, Native, at_least, failing, violate

NAMES = {
    "FLOAT": "Float", "HALF": "Half", "BF16": "BFloat16", "INT8": "Int8", "INT32": "Int32", "INT64": "Int64",
    "BOOL": "Bool", "UINT8": "UInt8", "FP8": "FP8", "INT4": "Int4",
}  # fmt: skip


class Runtime(Native):
    def __init__(self, logger: ILogger) -> None:
        self._report = Reporter(logger)
        without_device(self._report)
        self._host_code = False

    @property
    def logger(self) -> ILogger:
        return self._report.logger

    @property
    def error_recorder(self) -> IErrorRecorder:
        return self._report.recorder

    @error_recorder.setter
    def error_recorder(self, value: IErrorRecorder | None) -> None:
        self._report.recorder = value

    @property
    def engine_host_code_allowed(self) -> bool:
        return self._host_code

    @engine_host_code_allowed.setter
    def engine_host_code_allowed(self, value: bool) -> None:
        self._host_code = value

    def deserialize_cuda_engine(self, serialized_engine: Buffer) -> ICudaEngine | None:
        """None on every failure, with the reason in the log."""
        if failing("deserialize_none"):
            return self._report.error("IRuntime::deserializeCudaEngine: Error Code 1: Internal Error (injected)")
        data = bytes(memoryview(serialized_engine))
        found = _plan.read(data, self._host_code)
        if isinstance(found, str):
            return self._report.error(found)
        header, body = found
        return ICudaEngine._make(
            runtime=weakref.ref(self),
            report=self._report,
            header=header,
            model=load_proto(body),
            executable=None,
            shapes={},
        )


class ICudaEngine(Made):
    @property
    def name(self) -> str:
        return self._header["name"]

    @property
    def num_layers(self) -> int:
        return len(self._header["layers"])

    @property
    def num_io_tensors(self) -> int:
        return len(self._tensors())

    @property
    def num_optimization_profiles(self) -> int:
        return len(self._header["profiles"])

    @property
    def num_aux_streams(self) -> int:
        return self._header["aux_streams"]

    @property
    def refittable(self) -> bool:
        return bool(self._header["refit"])

    @property
    def device_memory_size_v2(self) -> int:
        return self._header["memory"]

    @property
    def profiling_verbosity(self) -> ProfilingVerbosity:
        return ProfilingVerbosity[self._header["verbosity"]]

    @property
    def hardware_compatibility_level(self) -> HardwareCompatibilityLevel:
        return HardwareCompatibilityLevel[self._header["compatibility"]]

    def get_device_memory_size_for_profile_v2(self, profile_index: int) -> int:
        return self._header["memory"]

    def _tensors(self) -> dict[str, dict[str, Any]]:
        inputs = {t["name"]: t | {"input": True} for t in self._header["inputs"]}
        return inputs | {t["name"]: t | {"input": False} for t in self._header["outputs"]}

    def _tensor(self, name: str) -> dict[str, Any]:
        tensors = self._tensors()
        if name not in tensors:
            violate(f"the engine has no tensor named {name}, only {list(tensors)}")
        return tensors[name]

    def get_tensor_name(self, index: int) -> str:
        return list(self._tensors())[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        if name not in self._tensors():
            return TensorIOMode.NONE
        return TensorIOMode.INPUT if self._tensors()[name]["input"] else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return DataType[self._tensor(name)["dtype"]]

    def get_tensor_shape(self, name: str) -> Dims:
        return Dims(self._tensor(name)["shape"])

    def get_tensor_location(self, name: str) -> TensorLocation:
        return TensorLocation.DEVICE

    def get_tensor_format(self, name: str) -> TensorFormat:
        return TensorFormat.LINEAR

    def is_shape_inference_io(self, name: str) -> bool:
        return False

    def get_tensor_profile_shape(self, name: str, profile_index: int) -> list[Dims]:
        shapes = self._header["profiles"][profile_index].get(name) or [self._tensor(name)["shape"]] * 3
        return [Dims(s) for s in shapes]

    def create_execution_context(
        self, strategy: ExecutionContextAllocationStrategy = ExecutionContextAllocationStrategy.STATIC
    ) -> IExecutionContext:
        if self._runtime() is None:
            violate("the runtime was freed before its engine")
        return IExecutionContext._make(
            engine=self,
            strategy=strategy,
            report=self._report,
            addresses={},
            profile=0,
            shapes={n: tuple(t["shape"]) for n, t in self._tensors().items()},
            block=(0, 0),
            warm=False,
            captured=weakref.WeakSet(),
            name="",
        )

    def create_engine_inspector(self) -> EngineInspector:
        return EngineInspector._make(engine=self, context=None)

    def create_serialization_config(self) -> ISerializationConfig:
        return ISerializationConfig._make(flags=1 << int(SerializationFlag.EXCLUDE_WEIGHTS))

    def serialize_with_config(self, arg0: ISerializationConfig) -> IHostMemory:
        header = dict(self._header)
        if arg0.get_flag(SerializationFlag.EXCLUDE_WEIGHTS) and header["weights"]:
            return IHostMemory(_plan.write(header, self._stripped_model()))
        if not arg0.get_flag(SerializationFlag.EXCLUDE_WEIGHTS):
            header |= {"weights": {}, "stripped": -1, "refit": ""}
        return IHostMemory(_plan.write(header, self._model))

    def serialize(self) -> IHostMemory:
        return self.serialize_with_config(self.create_serialization_config())

    def _stripped_model(self) -> Any:
        copy = type(self._model)()
        copy.CopyFrom(self._model)
        _plan.strip(copy)
        return copy

    def _run(self, tensors: dict[str, Any]) -> None:
        self._opened().run(tensors)

    def _output_shapes(self, inputs: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
        key = json.dumps(inputs)
        if key not in self._shapes:
            self._shapes[key] = self._opened().output_shapes(inputs)
        return self._shapes[key]

    def _opened(self) -> Executable:
        if self._missing():
            violate("an engine of a stripped plan was run without its weights: refit it first")
        if self._executable is None:
            copy = type(self._model)()
            copy.CopyFrom(self._model)
            self._executable = Executable(copy)
        return self._executable

    def _missing(self) -> list[str]:
        wanted = self._header["weights"]
        return [t.name for t in self._model.graph.initializer if t.name in wanted and not t.raw_data]


if at_least(10, 16):

    def get_engine_stat(self: ICudaEngine, stat: EngineStat = EngineStat.TOTAL_WEIGHTS_SIZE) -> int:
        if stat is EngineStat.STRIPPED_WEIGHTS_SIZE:
            return int(self._header["stripped"])
        return sum(len(t.raw_data) for t in self._model.graph.initializer)

    ICudaEngine.get_engine_stat = get_engine_stat  # type: ignore[attr-defined]


class ISerializationConfig(Made):
    @property
    def flags(self) -> int:
        return self._flags

    def set_flag(self, flag: SerializationFlag) -> bool:
        self._flags |= 1 << int(flag)
        return True

    def clear_flag(self, flag: SerializationFlag) -> bool:
        self._flags &= ~(1 << int(flag))
        return True

    def get_flag(self, flag: SerializationFlag) -> bool:
        return bool(self._flags >> int(flag) & 1)


class EngineInspector(Made):
    """Layers as the engine runs them; dtypes only of an engine that was built with DETAILED verbosity."""

    @property
    def execution_context(self) -> IExecutionContext:
        return self._context

    @execution_context.setter
    def execution_context(self, value: IExecutionContext | None) -> None:
        self._context = value

    def get_engine_information(self, format: LayerInformationFormat) -> str:
        header = self._engine._header
        layers = [self._layer(i) for i in range(self._engine.num_layers)]
        if header["verbosity"] == "NONE":
            layers = []
        if format is LayerInformationFormat.ONELINE:
            return "\n".join(str(layer) for layer in layers)
        if at_least(11):
            return json.dumps({"Layers": layers, "I/O Tensors": self._io_tensors()})
        return json.dumps({"Layers": layers, "Bindings": list(self._engine._tensors())})

    def get_layer_information(self, layer_index: int, format: LayerInformationFormat) -> str:
        return json.dumps(self._layer(layer_index))

    def _layer(self, index: int) -> Any:
        header = self._engine._header
        layer = header["layers"][index]
        if header["verbosity"] != "DETAILED":
            return layer["name"]
        profile = self._context.active_optimization_profile if self._context is not None else 0
        known = self._context is not None and not self._context.infer_shapes()
        return {
            "Name": layer["name"] + (f" [profile {profile}]" if profile else ""),
            "LayerType": layer["type"].title().replace("_", ""),
            "Inputs": [_tensor(t, known) for t in layer["inputs"]],
            "Outputs": [_tensor(t, known) for t in layer["outputs"]],
            "TacticName": "fake_onnxruntime",
            "StreamId": 0,
            "Metadata": f"[ONNX Layer: {layer['name']}]",
        }

    def _io_tensors(self) -> list[dict[str, Any]]:
        profile = {"Format": "Row major linear format (kLINEAR)"}
        return [
            {
                "Name": name,
                "IOMode": "Input" if t["input"] else "Output",
                "DataType": NAMES[t["dtype"]],
                "Dimensions": t["shape"],
                "Location": "Device",
                "IsShapeInferenceIO": False,
                "ProfileInfo": [profile | dict.fromkeys(("MinShape", "OptShape", "MaxShape"), t["shape"])],
            }
            for name, t in self._engine._tensors().items()
        ]


def _tensor(tensor: dict[str, Any], known: bool) -> dict[str, Any]:
    """11.x has format and type under keys of their own (migration guide; trt-samples' inspector reads "Datatype").

    Of a dynamic shape neither is told but in a context with all shapes set (header of IEngineInspector).
    """
    kind = NAMES[tensor["dtype"]] if known or -1 not in tensor["shape"] else "N/A due to dynamic shapes"
    entry = {"Name": tensor["name"], "Location": "Device", "Dimensions": tensor["shape"]}
    if at_least(11):
        return entry | {"Format": "Row major linear format (kLINEAR)", "Datatype": kind}
    return entry | {"Format/Datatype": kind}
