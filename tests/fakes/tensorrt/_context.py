"""Execution contexts: what is bound, and the rules about when it may change.

`execute_async_v3` reads the addresses when it is called and computes when the stream gets there: the work is put into
the fake stream, or into the capture under way. Without the fake CUDA layer it is done at once.
"""

from __future__ import annotations

import ctypes
import math
import weakref
from typing import TYPE_CHECKING, Any

from tensorrt._enums import DataType, ExecutionContextAllocationStrategy, Severity
from tensorrt._interfaces import Dims
from tensorrt._rules import Made, failing, violate

if TYPE_CHECKING:
    from tensorrt._engine import ICudaEngine

ALIGNMENT = 256


def _cuda() -> Any:
    """The fake `cuda.bindings.runtime`, or None where it is not installed or the real one is."""
    try:
        from cuda.bindings import runtime
    except ImportError:
        return None
    return runtime if hasattr(runtime, "_enqueue") else None


class _Work:
    """One enqueued execution. A captured graph keeps it alive, and so the context knows its captures."""

    def __init__(self, context: IExecutionContext, tensors: dict[str, Any], captured: bool, cuda: Any) -> None:
        self._context = weakref.ref(context)
        self._tensors = tensors
        self._block = context._block
        self._captured = captured
        self._cuda = cuda

    def __call__(self) -> None:
        context = self._context()
        if context is None:
            violate("work of an execution context runs after the context was freed")
        if self._cuda:
            self._check_memory()
        if self._block[0]:
            # Whoever keeps something in the activation block loses it, as on the GPU.
            ctypes.memset(self._block[0], 0xA5, context._engine.device_memory_size_v2)
        context._engine._run(self._tensors)
        if not self._captured:
            object.__setattr__(context, "_warm", True)

    def _check_memory(self) -> None:
        for name, (address, dtype, shape, _) in self._tensors.items():
            self._cuda._view(address, int(math.prod(shape) * dtype.itemsize), f"tensor {name} of an engine")
        if self._block[0]:
            self._cuda._view(*self._block, "the activation block of an engine")


class IExecutionContext(Made):
    @property
    def engine(self) -> ICudaEngine:
        return self._engine

    @property
    def name(self) -> str:
        return self._name

    @name.setter
    def name(self, value: str) -> None:
        self._name = value

    @property
    def active_optimization_profile(self) -> int:
        return self._profile

    def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
        """Forgets all shapes; the shapes and an enqueue must follow on the same stream."""
        if not 0 <= profile_index < self._engine.num_optimization_profiles:
            raise RuntimeError(f"no optimization profile {profile_index}")
        cuda = _cuda() if int(stream_handle) else None
        if cuda and cuda._capturing(int(stream_handle)):
            violate("an optimization profile was set inside a capture")
        self._unchanged_in_graphs("the optimization profile")
        self._profile, self._warm = int(profile_index), False
        self._shapes = {n: tuple(t["shape"]) for n, t in self._engine._tensors().items()}
        return True

    def _unchanged_in_graphs(self, what: str) -> None:
        if len(self._captured):
            violate(f"{what} of a context was changed while a graph holds its enqueue: capture it again")

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self._engine._tensor(name)
        if memory % ALIGNMENT:
            violate(f"the address of {name}, {int(memory):#x}, is not aligned to {ALIGNMENT} bytes")
        if self._addresses.get(name) != int(memory):
            self._unchanged_in_graphs(f"the address of {name}")
        self._addresses[name] = int(memory)
        return True

    def get_tensor_address(self, name: str) -> int:
        return self._addresses.get(name, 0)

    def set_input_shape(self, name: str, shape: tuple | list | Dims) -> bool:  # type: ignore[type-arg]
        tensor = self._engine._tensor(name)
        asked = tuple(int(d) for d in shape)
        fits = len(asked) == len(tensor["shape"]) and all(
            want in (-1, got) for want, got in zip(tensor["shape"], asked, strict=True)
        )
        low, _, high = self._engine.get_tensor_profile_shape(name, self._profile)
        if -1 in tensor["shape"]:
            fits = fits and all(a <= b <= c for a, b, c in zip(low, asked, high, strict=True))
        if not tensor["input"] or not fits:
            text = f"IExecutionContext::setInputShape: Error Code 3: API Usage Error (Parameter check failed: {name} {asked})"  # noqa: E501
            self._report.error(text)
            return False
        if self._shapes[name] != asked:
            self._unchanged_in_graphs(f"the shape of {name}")
            self._warm = False
        self._shapes[name] = asked
        return True

    def get_tensor_shape(self, name: str) -> Dims:
        self._engine._tensor(name)
        return Dims(self._bound_shapes()[name])

    def infer_shapes(self) -> list[str]:
        inputs = [t["name"] for t in self._engine._header["inputs"]]
        return [name for name in inputs if -1 in self._shapes[name]]

    def _bound_shapes(self) -> dict[str, tuple[int, ...]]:
        """With those of the outputs, once all inputs have one."""
        dynamic = any(-1 in t["shape"] for t in self._engine._header["outputs"])
        if not dynamic or self.infer_shapes():
            return self._shapes
        inputs = {t["name"]: (t["dtype"], self._shapes[t["name"]]) for t in self._engine._header["inputs"]}
        return self._shapes | self._engine._output_shapes(inputs)

    def set_device_memory(self, memory: int, size: int) -> None:
        need = self._engine.device_memory_size_v2
        if self._strategy is not ExecutionContextAllocationStrategy.USER_MANAGED:
            violate("set_device_memory on a context that manages its own memory")
        if memory % ALIGNMENT:
            violate(f"device memory at {int(memory):#x} is not aligned to {ALIGNMENT} bytes")
        if size < need or (need and not memory):
            violate(f"device memory of {int(size)} bytes, the engine needs {need}")
        if self._block != (int(memory), int(size)):
            self._unchanged_in_graphs("the device memory")
            self._warm = False
        self._block = (int(memory), int(size))

    def update_device_memory_size_for_shapes(self) -> int:
        return self._engine.device_memory_size_v2

    def execute_async_v3(self, stream_handle: int) -> bool:
        handle = int(stream_handle)
        cuda = _cuda() if handle else None  # the legacy stream waits for all others, and all others for it
        capturing = bool(cuda and cuda._capturing(handle))
        if handle == 0:
            self._report(
                Severity.WARNING,
                "Using default stream in enqueueV3() may lead to performance issues due to additional calls to "
                "cudaStreamSynchronize() by TensorRT to ensure correct synchronization. Please use non-default "
                "stream instead.",
            )
        self._check_ready(capturing)
        if failing("enqueue_false"):
            self._report.error("IExecutionContext::enqueueV3: Error Code 1: Cuda Runtime (injected failure)")
            return False
        if self.infer_shapes():
            self._report.error(f"IExecutionContext::enqueueV3: Error Code 7: shapes not set: {self.infer_shapes()}")
            return False
        work = _Work(self, self._bound(), capturing, cuda)
        if cuda is None:
            work()
            return True
        if capturing:
            self._captured.add(work)
        cuda._enqueue(handle, work, f"TensorRT engine {self._engine.name}")
        return True

    def _check_ready(self, capturing: bool) -> None:
        for name in self._engine._tensors():
            if not self._addresses.get(name):
                violate(f"enqueued while no address was set for {name}")
        managed = self._strategy is ExecutionContextAllocationStrategy.USER_MANAGED
        if managed and self._engine.device_memory_size_v2 and not self._block[0]:
            violate("a USER_MANAGED context was enqueued without device memory")
        if self._engine._runtime() is None:
            violate("the runtime was freed before its engine")
        if capturing and not self._warm:
            violate("captured before the context was run once with these shapes and this device memory")

    def _bound(self) -> dict[str, tuple[int, DataType, tuple[int, ...], bool]]:
        """Addresses, types and shapes as they are now."""
        shapes = self._bound_shapes()
        return {
            name: (self._addresses[name], DataType[t["dtype"]], shapes[name], t["input"])
            for name, t in self._engine._tensors().items()
        }
