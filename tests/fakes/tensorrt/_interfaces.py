"""Loggers, monitors, recorders and small values: what users derive from and what crosses the border."""

from __future__ import annotations

import array
import collections.abc
import contextlib
import math
import sys
import time
import traceback
from typing import Any

from tensorrt._enums import DataType, ErrorCodeTRT, Severity
from tensorrt._rules import Native, Overridable, failing, initialised

Buffer = Any


class ILogger(Overridable):
    """`log` is called from several threads."""

    INTERNAL_ERROR = Severity.INTERNAL_ERROR
    ERROR = Severity.ERROR
    WARNING = Severity.WARNING
    INFO = Severity.INFO
    VERBOSE = Severity.VERBOSE
    Severity = Severity

    def __init__(self) -> None:
        super().__init__()

    def log(self, severity: Severity, msg: str) -> None:
        print('[ERROR] Exception caught in log(): Tried to call pure virtual function "ILogger::log"', file=sys.stderr)


class Logger(ILogger):
    """Prints to stdout, as the binding's does."""

    def __init__(self, min_severity: Severity = Severity.WARNING) -> None:
        super().__init__()
        self._min_severity = min_severity

    @property
    def min_severity(self) -> Severity:
        return self._min_severity

    @min_severity.setter
    def min_severity(self, value: Severity) -> None:
        self._min_severity = value

    def log(self, severity: Severity, msg: str) -> None:
        if int(severity) <= int(self._min_severity):
            letter = {"INTERNAL_ERROR": "F", "VERBOSE": "V"}.get(severity.name, severity.name[0])
            print(f"[{time.strftime('%m/%d/%Y-%H:%M:%S')}] [TRT] [{letter}] {msg}", flush=True)


class IErrorRecorder(Overridable):
    def __init__(self) -> None:
        super().__init__()

    @property
    def MAX_DESC_LENGTH(self) -> int:  # noqa: N802
        return 127

    def clear(self) -> None: ...

    def get_error_code(self, arg0: int) -> Any: ...

    def get_error_desc(self, arg0: int) -> Any: ...

    def has_overflowed(self) -> Any: ...

    def num_errors(self) -> Any: ...

    def report_error(self, arg0: ErrorCodeTRT, arg1: str) -> Any: ...


class IProgressMonitor(Overridable):
    """Called from several threads. A `step_complete` that does not return True cancels the build."""

    def __init__(self) -> None:
        super().__init__()

    def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None: ...

    def step_complete(self, phase_name: str, step: int) -> Any: ...

    def phase_finish(self, phase_name: str) -> None: ...


class IStreamWriter(Overridable):
    """Gets a plan piece by piece; what it returns is how many bytes it took."""

    def __init__(self) -> None:
        super().__init__()

    def write(self, data: bytes) -> Any: ...


class Dims(Native, collections.abc.Sequence):  # type: ignore[type-arg]
    MAX_DIMS = 8

    def __init__(self, shape: Any = ()) -> None:
        self._shape = tuple(int(d) for d in shape)

    def __len__(self) -> int:
        return len(self._shape)

    def __getitem__(self, index: Any) -> Any:
        return self._shape[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Dims | tuple | list) and self._shape == tuple(other)

    def __hash__(self) -> int:
        return hash(self._shape)

    def __repr__(self) -> str:
        return str(self._shape)


class Weights(Native):
    """A pointer and a count, or a view of an array: nothing is copied."""

    def __init__(self, type: Any = DataType.FLOAT, ptr: int = 0, count: int = 0, *, a: Any = None) -> None:
        self._array = a if a is not None else None if isinstance(type, DataType) else type
        self._state = (type, ptr, count)

    @property
    def dtype(self) -> DataType:
        if self._array is None:
            return self._state[0]
        return {"float32": DataType.FLOAT, "float16": DataType.HALF, "int32": DataType.INT32}[str(self._array.dtype)]

    @property
    def size(self) -> int:
        return int(self._state[2] if self._array is None else self._array.size)

    @property
    def nbytes(self) -> int:
        return int(self.size * self.dtype.itemsize)

    def _address(self) -> int:
        return int(self._state[1] if self._array is None else self._array.ctypes.data)


def _forbidden(*_: Any) -> Any:
    raise TypeError("an IHostMemory is a buffer and nothing else: bytes(plan) or memoryview(plan)")


def padded(content: bytes) -> bytes:
    """With blanks, to whole floats: what an IHostMemory can hold."""
    return content + b" " * (-len(content) % 4)


class IHostMemory(array.array):  # type: ignore[type-arg]
    """A buffer: bytes() and memoryview() take it, len() and slices do not. (Python 3.11 has no __buffer__.)

    The format of its memoryview is that of floats, as the binding's is, whose items are single bytes for all that: one
    item of it means nothing.
    """

    def __new__(cls, content: bytes) -> IHostMemory:
        return super().__new__(cls, "f", content)

    @property
    def nbytes(self) -> int:
        return memoryview(self).nbytes

    @property
    def dtype(self) -> DataType:
        return DataType.INT8

    def __bool__(self) -> bool:
        return True

    __len__ = __getitem__ = __iter__ = __contains__ = __add__ = _forbidden


def volume(iterable: Any) -> int:
    return math.prod(iterable)


def nptype(trt_type: DataType) -> Any:
    import numpy as np

    names = {"FLOAT": "float32", "HALF": "float16", "INT8": "int8", "INT32": "int32", "INT64": "int64"}
    names |= {"BOOL": "bool", "UINT8": "uint8"}
    if trt_type.name not in names:
        raise TypeError("Could not resolve TensorRT datatype to an equivalent numpy datatype.")
    return np.dtype(names[trt_type.name]).type


def without_device(report: Reporter) -> None:
    """The injected failure no_device: a line in the log and pybind11's TypeError, as without a driver."""
    if failing("no_device"):
        report.error("createInferRuntime: Error Code 6: API Usage Error (CUDA initialization failure with error: 35.)")
        raise TypeError("pybind11::init(): factory function returned nullptr")


class Reporter:
    """A logger with its recorder: where errors go that the binding does not raise."""

    def __init__(self, logger: ILogger) -> None:
        initialised(logger)
        self.logger = logger
        self.recorder: IErrorRecorder | None = None

    def __call__(self, severity: Severity, text: str, code: Any = None) -> None:
        try:
            self.logger.log(severity, text)
        except Exception:  # the trampoline prints what a logger raises, and goes on
            traceback.print_exc()
        if int(severity) <= int(Severity.ERROR) and self.recorder is not None:
            with contextlib.suppress(Exception):
                self.recorder.report_error(code or ErrorCodeTRT.UNSPECIFIED_ERROR, text)

    def error(self, text: str, code: Any = None) -> None:
        self(Severity.ERROR, text, code)
