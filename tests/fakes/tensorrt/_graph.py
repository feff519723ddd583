"""ONNX models as the fake's networks: what they hold, and running them with ONNX Runtime on the CPU.

ONNX Runtime has no bfloat16 kernels on the CPU, so a bfloat16 graph is run in float32: its signature is right, its
rounding is not.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from tensorrt._enums import DataType
from tensorrt._rules import violate

BFLOAT16 = 16
DTYPES = {
    1: DataType.FLOAT, 2: DataType.UINT8, 3: DataType.INT8, 6: DataType.INT32, 7: DataType.INT64, 9: DataType.BOOL,
    10: DataType.HALF, 11: DataType.FLOAT, BFLOAT16: DataType.BF16, 17: DataType.FP8, 22: DataType.INT4,
}  # fmt: skip
NUMPY = {
    "FLOAT": "float32", "UINT8": "uint8", "INT8": "int8", "INT32": "int32", "INT64": "int64", "BOOL": "bool",
    "HALF": "float16", "BF16": "uint16",
}  # fmt: skip
UNSUPPORTED = {
    "AffineGrid", "Bernoulli", "BitShift", "BitwiseAnd", "BitwiseNot", "BitwiseOr", "BitwiseXor", "CenterCropPad",
    "Col2Im", "Compress", "ConvInteger", "Det", "DynamicQuantizeLinear", "MatMulInteger", "MaxRoiPool", "MaxUnpool",
    "Multinomial", "QLinearConv", "QLinearMatMul", "SequenceAt", "SequenceConstruct", "SplitToSequence",
    "StringNormalizer", "Unique",
}  # fmt: skip


def read_memory(address: int, nbytes: int, what: str) -> bytes:
    """The bytes at an address, through the kernel: memory that was freed is a broken rule and not a crash."""
    parts, at = [], address
    try:
        file = os.open("/proc/self/mem", os.O_RDONLY)
    except OSError:
        return ctypes.string_at(address, nbytes)
    try:
        while at < address + nbytes:
            parts.append(os.pread(file, min(address + nbytes - at, 1 << 30), at))
            if not parts[-1]:
                violate(f"{what} lies in memory that was freed")
            at += len(parts[-1])
    except OSError:
        violate(f"{what} lies in memory that was freed")
    finally:
        os.close(file)
    return b"".join(parts)


class Initializers:
    """`load_initializer`: addresses alone are kept, and read when the network is built."""

    def __init__(self) -> None:
        self.held: dict[str, tuple[int, int, str]] = {}

    def load(self, name: str, address: int, nbytes: int) -> None:
        content = read_memory(address, nbytes, f"the initializer {name}")
        self.held[name] = (address, nbytes, hashlib.sha256(content).hexdigest())

    def read(self, name: str) -> bytes:
        address, nbytes, digest = self.held[name]
        content = read_memory(address, nbytes, f"the buffer of initializer {name} at the time of the build")
        if hashlib.sha256(content).hexdigest() != digest:
            violate(f"the buffer of initializer {name} was changed or reused before the build")
        return content


def load_proto(data: bytes) -> Any:
    """A ModelProto, or None for bytes that are none."""
    import onnx

    try:
        model = onnx.load_model_from_string(data)
    except Exception:
        return None
    return model if model.HasField("graph") and model.opset_import else None


def opset(model: Any) -> int:
    return next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 0)


def one_type(node: Any, version: int) -> list[str]:
    """The inputs of a node that ONNX wants to be of one type; none where it wants nothing."""
    import onnx

    try:
        formal = onnx.defs.get_schema(node.op_type, version).inputs
    except onnx.defs.SchemaError:
        return []
    places = [formal[min(i, len(formal) - 1)] for i in range(len(node.input))]
    groups: dict[str, list[str]] = {}
    for name, place in zip(node.input, places, strict=True):
        if name and place.is_homogeneous and "(" not in place.type_str:
            groups.setdefault(place.type_str, []).append(name)
    return max(groups.values(), key=len, default=[])


def is_external(tensor: Any) -> bool:
    return bool(tensor.data_location == 1)


def external_bytes(tensor: Any, folder: Path | None) -> bytes | None:
    """The bytes of an initializer that lies in a file beside the model, or None where there is no such file."""
    place = {e.key: e.value for e in tensor.external_data}
    folder = folder or Path()  # a model without a path is taken to lie in the working directory
    if not (folder / place["location"]).is_file():
        return None
    with (folder / place["location"]).open("rb") as file:
        file.seek(int(place.get("offset", 0)))
        return file.read(int(place["length"]) if "length" in place else -1)


def nbytes_of(tensor: Any) -> int:
    size = DTYPES[tensor.data_type].itemsize if tensor.data_type in DTYPES else 8
    return int(np.prod(list(tensor.dims), dtype=np.int64) * size)


def embed(tensor: Any, content: bytes) -> None:
    """Puts bytes into an initializer."""
    for field in ("float_data", "int32_data", "int64_data", "external_data"):
        tensor.ClearField(field)
    tensor.data_location = 0
    tensor.raw_data = content


def content_of(tensor: Any) -> bytes:
    from onnx import numpy_helper

    return tensor.raw_data or bytes(numpy_helper.to_array(tensor).tobytes())


def tensor_types(model: Any) -> dict[str, tuple[int, tuple[int, ...]]]:
    """Element type and shape of every tensor; -1 for a dimension that is not known."""
    import onnx

    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for tensor in bare.graph.initializer:
        if nbytes_of(tensor) > 4096:  # shape inference needs the small ones' values
            embed(tensor, b"")
    known = dict.fromkeys(t.name for t in bare.graph.initializer)
    graph = onnx.shape_inference.infer_shapes(bare).graph
    found: dict[str, tuple[int, tuple[int, ...]]] = {
        t.name: (t.data_type, tuple(t.dims)) for t in model.graph.initializer
    }
    for value in (*graph.value_info, *graph.output, *graph.input):
        if value.name not in known:
            kind = value.type.tensor_type
            dims = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in kind.shape.dim)
            found[value.name] = (kind.elem_type, dims)
    return found


def _without_bfloat16(model: Any) -> None:
    """Rewrites bfloat16 as float32, in place."""
    import onnx

    def tensor(t: Any) -> None:
        if t.data_type == BFLOAT16:
            bits = np.frombuffer(content_of(t), np.uint16).astype(np.uint32) << 16
            t.data_type = 1
            embed(t, bits.tobytes())

    def graph(g: Any) -> None:
        for t in g.initializer:
            tensor(t)
        for value in (*g.input, *g.output, *g.value_info):
            if value.type.tensor_type.elem_type == BFLOAT16:
                value.type.tensor_type.elem_type = 1
        for node in g.node:
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.TENSOR:
                    tensor(attribute.t)
                elif attribute.type == onnx.AttributeProto.GRAPH:
                    graph(attribute.g)
                elif attribute.name in ("to", "dtype", "output_dtype", "stash_type") and attribute.i == BFLOAT16:
                    attribute.i = 1

    graph(model.graph)


class Executable:
    """A model in ONNX Runtime, on host memory."""

    def __init__(self, model: Any) -> None:
        import onnxruntime

        _without_bfloat16(model)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.log_severity_level = 3
        self._session = onnxruntime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [i.name for i in self._session.get_inputs()]

    def output_shapes(self, inputs: dict[str, tuple[str, tuple[int, ...]]]) -> dict[str, tuple[int, ...]]:
        feeds = {
            name: np.zeros(shape, np.float32 if dtype == "BF16" else NUMPY[dtype])
            for name, (dtype, shape) in inputs.items()
            if name in self._inputs
        }
        names = [o.name for o in self._session.get_outputs()]
        return {name: value.shape for name, value in zip(names, self._session.run(names, feeds), strict=True)}

    def run(self, tensors: dict[str, tuple[int, DataType, tuple[int, ...], bool]]) -> None:
        """name -> (address, dtype, shape, whether it is an input); writes the outputs where they are bound."""
        feeds = {n: _load(*tensors[n][:3]) for n in self._inputs}
        outputs = [n for n, t in tensors.items() if not t[3]]
        for name, value in zip(outputs, self._session.run(outputs, feeds), strict=True):
            address, dtype, shape, _ = tensors[name]
            if value.shape != shape:
                violate(f"output {name} has shape {value.shape}, the context said {shape}")
            _store(address, dtype, value)


def _view(address: int, dtype: DataType, shape: tuple[int, ...]) -> Any:
    kind = np.dtype(NUMPY[dtype.name])
    size = int(np.prod(shape, dtype=np.int64)) * kind.itemsize
    return np.frombuffer((ctypes.c_char * size).from_address(address), kind).reshape(shape)


def _load(address: int, dtype: DataType, shape: tuple[int, ...]) -> Any:
    view = _view(address, dtype, shape)
    if dtype is DataType.BF16:
        return (view.astype(np.uint32) << 16).view(np.float32)
    return view.copy()


def _store(address: int, dtype: DataType, value: Any) -> None:
    if dtype is DataType.BF16:
        bits = np.ascontiguousarray(value, np.float32).view(np.uint32)
        value = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)  # round half to even
    _view(address, dtype, value.shape)[...] = value
