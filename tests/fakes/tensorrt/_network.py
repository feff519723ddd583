"""Networks and the ONNX parser."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

from tensorrt._enums import (
    DataType,
    ErrorCode,
    LayerType,
    NetworkDefinitionCreationFlag,
    OnnxParserFlag,
    TensorLocation,
)
from tensorrt._graph import (
    DTYPES,
    UNSUPPORTED,
    Initializers,
    embed,
    external_bytes,
    is_external,
    load_proto,
    nbytes_of,
    one_type,
    opset,
    tensor_types,
)
from tensorrt._interfaces import Buffer, Dims, ILogger, Reporter
from tensorrt._rules import Made, Native, at_least, failing, violate

KINDS = {
    "Conv": "CONVOLUTION", "ConvTranspose": "DECONVOLUTION", "Cast": "CAST", "Softmax": "SOFTMAX",
    "Concat": "CONCATENATION",
    "Reshape": "SHUFFLE", "Transpose": "SHUFFLE", "Slice": "SLICE", "Shape": "SHAPE", "Resize": "RESIZE",
    "Gather": "GATHER", "MatMul": "MATRIX_MULTIPLY", "Gemm": "MATRIX_MULTIPLY", "Constant": "CONSTANT",
    "Identity": "IDENTITY", "Where": "SELECT", "Einsum": "EINSUM", "Pad": "PADDING", "TopK": "TOPK",
    "ReduceMean": "REDUCE", "ReduceSum": "REDUCE", "LayerNormalization": "NORMALIZATION",
    "InstanceNormalization": "NORMALIZATION", "GroupNormalization": "NORMALIZATION", "Sigmoid": "ACTIVATION",
    "Relu": "ACTIVATION", "Tanh": "ACTIVATION", "Squeeze": "SQUEEZE", "Unsqueeze": "UNSQUEEZE",
    "QuantizeLinear": "QUANTIZE", "DequantizeLinear": "DEQUANTIZE", "Sqrt": "UNARY", "Exp": "UNARY", "Sin": "UNARY",
    "Cos": "UNARY", "Neg": "UNARY", "Erf": "UNARY",
}  # fmt: skip

CONVERTED = frozenset({"Clip", "Pad"})
"""Operators whose constants the parser converts to the type of their data."""


def _at(items: list[Any], index: int) -> Any:
    """None where there is none, and for numbers below zero too."""
    return items[index] if 0 <= index < len(items) else None


class ITensor(Made):
    @property
    def name(self) -> str:
        return self._name

    @property
    def dtype(self) -> DataType:
        return self._dtype

    @property
    def shape(self) -> Dims:
        return Dims(self._shape)

    @property
    def is_network_input(self) -> bool:
        return self._is_input

    @property
    def location(self) -> TensorLocation:
        return TensorLocation.DEVICE


class ILayer(Made):
    @property
    def name(self) -> str:
        return self._name

    @property
    def type(self) -> LayerType:
        return self._type

    @property
    def metadata(self) -> str:
        return f"[ONNX Layer: {self._name}]"

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def get_output(self, index: int) -> ITensor:
        return self._outputs[index]

    def get_output_type(self, index: int) -> DataType:
        return self._outputs[index].dtype


class IAttention(Made):
    """One attention of the network; seen through its boundary layers."""

    @property
    def name(self) -> str:
        return self._name

    @property
    def decomposable(self) -> bool:
        return self._decomposable

    @decomposable.setter
    def decomposable(self, value: bool) -> None:
        self._decomposable = value

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    def get_input(self, index: int) -> ITensor:
        return self._inputs[index]

    def _fuses(self) -> bool:
        """The limits of the fused kernels (transformers-fused-attention.html)."""
        width = self._inputs[0].shape[-1]
        half = self._inputs[0].dtype in (DataType.HALF, DataType.BF16)
        return half and 16 <= width <= 256 and width % 8 == 0


class IAttentionBoundaryLayer(ILayer):
    @property
    def attention(self) -> IAttention:
        return self._attention


class IAttentionInputLayer(IAttentionBoundaryLayer):
    pass


class IAttentionOutputLayer(IAttentionBoundaryLayer):
    pass


class INetworkDefinition(Made):
    @property
    def name(self) -> str:
        return self._name

    @name.setter
    def name(self, value: str) -> None:
        self._name = value

    @property
    def flags(self) -> int:
        return self._flags

    def get_flag(self, flag: NetworkDefinitionCreationFlag) -> bool:
        return bool(self._flags >> int(flag) & 1)

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def num_inputs(self) -> int:
        return len(self._inputs)

    @property
    def num_outputs(self) -> int:
        return len(self._outputs)

    def get_layer(self, index: int) -> ILayer:
        return _at(self._layers, index)

    def get_input(self, index: int) -> ITensor:
        return _at(self._inputs, index)

    def get_output(self, index: int) -> ITensor:
        return _at(self._outputs, index)

    def _strongly_typed(self) -> bool:
        return at_least(11) or self.get_flag(NetworkDefinitionCreationFlag.STRONGLY_TYPED)

    def _fill(self, model: Any, initializers: Initializers) -> None:
        self._model, self._initializers = model, initializers
        self._types = tensor_types(model)
        constants = {t.name for t in model.graph.initializer}
        self._inputs = [self._tensor(v.name, True) for v in model.graph.input if v.name not in constants]
        self._outputs = [self._tensor(v.name) for v in model.graph.output]
        for node in model.graph.node:
            self._layers += self._layers_of(node)

    def _tensor(self, name: str, is_input: bool = False) -> ITensor:
        kind, shape = self._types.get(name, (0, ()))
        return ITensor._make(name=name, dtype=DTYPES.get(kind, DataType.FLOAT), shape=shape, is_input=is_input)

    def _layers_of(self, node: Any) -> list[ILayer]:
        state = {
            "name": node.name or node.op_type,
            "node": node,
            "inputs": [self._tensor(n) for n in node.input if n],
            "outputs": [self._tensor(n) for n in node.output if n],
        }
        if node.op_type != "Attention":
            return [ILayer._make(type=LayerType[KINDS.get(node.op_type, "ELEMENTWISE")], **state)]
        attention = IAttention._make(decomposable=False, **state)
        self._attentions.append(attention)
        return [
            ILayer._make(type=LayerType[kind], attention=attention, **state)
            for kind in ("ATTENTION_INPUT", "ATTENTION_OUTPUT")
        ]

    def _read_weights(self) -> Any:
        """The model with the bytes of every initializer in it: addresses are read now."""
        import onnx

        model = onnx.ModelProto()
        model.CopyFrom(self._model)
        for tensor in model.graph.initializer:
            if tensor.name in self._initializers.held:
                embed(tensor, self._initializers.read(tensor.name))
        return model


class ParserError(Made):
    def code(self) -> ErrorCode:
        return self._code

    def desc(self) -> str:
        return self._desc

    def file(self) -> str:
        return "ModelImporter.cpp"

    def func(self) -> str:
        return "parseNode"

    def line(self) -> int:
        return 0

    def node(self) -> int:
        return self._index

    def node_name(self) -> str:
        return self._node.name if self._node is not None else ""

    def node_operator(self) -> str:
        return self._node.op_type if self._node is not None else ""

    def local_function_stack(self) -> list[str]:
        return []

    def local_function_stack_size(self) -> int:
        return 0


class Loader:
    """What the parser and its refitter share: a model, its initializers, errors."""

    def __init__(self, logger: ILogger) -> None:
        self.report = Reporter(logger)
        self.errors: list[ParserError] = []
        self.model: Any = None
        self.initializers = Initializers()
        self.sizes: dict[int, int] = {}  # of the weights that nodes use, by address

    def fail(self, text: str, code: str = "UNSUPPORTED_NODE", index: int = -1, node: Any = None) -> bool:
        self.errors.append(ParserError._make(desc=text, code=ErrorCode[code], index=index, node=node))
        where = f"While parsing node number {index} [{node.op_type}]: " if node is not None else ""
        self.report.error(f"{where}{text}")
        return False

    def load(self, data: Buffer, folder: Path | None) -> bool:
        self.model = load_proto(bytes(memoryview(data)))
        if self.model is None:
            return self.fail("Failed to parse ONNX model: the data is no ModelProto", "MODEL_DESERIALIZE_FAILED")
        self.folder = folder
        return True

    def load_file(self, model: str) -> bool:
        try:
            data = Path(model).read_bytes()
        except OSError:
            return self.fail(f"Failed to open file: {model}", "MODEL_DESERIALIZE_FAILED")
        return self.load(data, Path(model).parent)

    def attach(self, name: str, address: int, nbytes: int) -> bool:
        """What is wrong is in the log, and none of the parser's errors."""
        if self.model is None:
            return self.log("An ONNX model has not been loaded yet - cannot load initializer.")
        tensor = next((t for t in self.model.graph.initializer if t.name == name), None)
        if tensor is None:
            return self.log(f"Cannot find initializer name: {name} in model!")
        if nbytes != nbytes_of(tensor):
            wanted = nbytes_of(tensor)
            return self.log(f"Provided initializer size {nbytes} mismatches with that expected by the model: {wanted}")
        if not address:
            return self.log(f"The data of the initializer {name} is null")
        self.initializers.load(name, address, nbytes)
        return True

    def log(self, text: str) -> bool:
        self.report.error(text)
        return False

    def resolve(self) -> bool:
        """Embeds external data that lies in files; False where an initializer has no bytes at all."""
        if self.model is None:
            return self.log("An ONNX model has not been loaded yet - cannot parse empty model.")
        for tensor in self.model.graph.initializer:
            if is_external(tensor) and tensor.name not in self.initializers.held:
                content = external_bytes(tensor, self.folder)
                if content is None or len(content) != nbytes_of(tensor):
                    return self.fail(f"Failed to import initializer: {tensor.name}", "INVALID_GRAPH")
                embed(tensor, content)
        return True


class OnnxParser(Native):
    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._of = weakref.ref(network)  # the binding keeps no network alive either, and crashes without
        self._loader = Loader(logger)
        self._flags = 1 << int(OnnxParserFlag.NATIVE_INSTANCENORM)

    def parse(self, model: Buffer, path: str | None = None) -> bool:
        return self._loader.load(model, Path(path).parent if path else None) and self.parse_model_proto()

    def parse_from_file(self, model: str) -> bool:
        return self._loader.load_file(model) and self.parse_model_proto()

    def load_model_proto(self, model: Buffer, path: str | None = None) -> bool:
        return self._loader.load(model, Path(path).parent if path else None)

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        return self._loader.attach(name, int(data), int(size))

    def parse_model_proto(self) -> bool:
        loader, network = self._loader, self._of()
        if network is None:
            violate("the network of a parser was freed before it parsed")
        if network._layers:
            return loader.log("Parse was called with a non-empty network definition")
        if not loader.resolve():
            return False
        version = opset(loader.model)
        loader.types = tensor_types(loader.model)
        for index, node in enumerate(loader.model.graph.node):
            why = self._refuses(node, version, index)
            if why:
                return loader.fail(why, "UNSUPPORTED_NODE", index, node)
            why = self._invalid(node, version) if network._strongly_typed() else None
            if why:
                return loader.fail(f"Invalid Node - {node.name}\n{why}", "INVALID_NODE", index, node)
        network._fill(loader.model, loader.initializers)
        return True

    def _refuses(self, node: Any, version: int, index: int) -> str | None:
        if failing("parse_error") and index == 0:
            return "Assertion failed: injected failure"
        if node.op_type in UNSUPPORTED:
            return f"No importer registered for op: {node.op_type}"
        if node.op_type == "Attention" and not at_least(10, 14):
            return "No importer registered for op: Attention"
        if node.op_type == "GroupNormalization" and version >= 21 and not at_least(10, 15):
            return "Assertion failed: GroupNormalization of opset 21 is not supported"
        return None

    def _invalid(self, node: Any, version: int) -> str | None:
        """What a strongly typed network does not hold: inputs of several types, weights of one place and two sizes."""
        loader = self._loader
        converted = {t.name for t in loader.model.graph.initializer} if node.op_type in CONVERTED else set()
        known = [loader.types[n][0] for n in one_type(node, version) if n in loader.types and n not in converted]
        kinds = dict.fromkeys(DTYPES[kind].name.capitalize() for kind in known if kind in DTYPES)
        if len(kinds) > 1:
            return f"{node.name}: inputs must have same types. But they are of types {' and '.join(kinds)}"
        for name in node.input:
            address, nbytes, _ = loader.initializers.held.get(name, (0, 0, ""))
            if address and loader.sizes.setdefault(address, nbytes) != nbytes:
                return f"INetworkDefinition::setWeightsName: Weights of same values but of different counts: {name}"
        return None

    @property
    def num_errors(self) -> int:
        return len(self._loader.errors)

    def get_error(self, index: int) -> ParserError:
        return _at(self._loader.errors, index)

    def clear_errors(self) -> None:
        self._loader.errors.clear()

    @property
    def flags(self) -> int:
        return self._flags

    @flags.setter
    def flags(self, value: int) -> None:
        self._flags = int(value)

    def set_flag(self, flag: OnnxParserFlag) -> None:
        self._flags |= 1 << int(flag)

    def clear_flag(self, flag: OnnxParserFlag) -> None:
        self._flags &= ~(1 << int(flag))

    def get_flag(self, flag: OnnxParserFlag) -> bool:
        return bool(self._flags >> int(flag) & 1)

    def supports_operator(self, op_name: str) -> bool:
        import onnx

        return op_name not in UNSUPPORTED and onnx.defs.has(op_name)
