"""The buffers of an engine on a GPU: those that it is given, and its own for outputs that nobody reads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.cuda.memory import DeviceBuffer, DeviceMemory
from toolchain.engines.buffers import check_buffer
from toolchain.signature import GraphSpec, TensorSpec


class EngineBuffers:
    """Finds a buffer for every tensor of an engine, whose launches keep the addresses.

    Outputs that nobody reads get buffers of their own: a captured graph wants an address for each.
    """

    def __init__(self, spec: GraphSpec, folder: Path, memory: DeviceMemory, alignment: int = 1) -> None:
        """`alignment`, in bytes, is required of every address. `folder` is named in errors."""
        self._spec, self._folder, self._memory, self._alignment = spec, folder, memory, alignment
        self._unread: dict[str, DeviceBuffer] = {}

    def by_tensor(self, given: Mapping[str, DeviceBuffer]) -> dict[str, DeviceBuffer]:
        """A buffer by the name of each tensor. Raises EngineError for one that is missing or does not fit."""
        inputs = {t.name: self._checked(t, given.get(t.name)) for t in self._spec.inputs}
        outputs = {t.name: self._checked(t, given.get(t.name) or self._unread_buffer(t)) for t in self._spec.outputs}
        return inputs | outputs

    def free(self) -> None:
        """Frees the buffers of unread outputs."""
        self._memory.free(*self._unread.values())
        self._unread = {}

    def _checked(self, tensor: TensorSpec, buffer: DeviceBuffer | None) -> DeviceBuffer:
        also = f"at a multiple of {self._alignment} bytes" if self._alignment > 1 else ""
        aligned = buffer is not None and buffer.address % self._alignment == 0
        return check_buffer(tensor, buffer, self._folder, also=also, fits=aligned)

    def _unread_buffer(self, tensor: TensorSpec) -> DeviceBuffer:
        if tensor.name not in self._unread:
            self._unread[tensor.name] = self._memory.zeros(tensor.shape, tensor.dtype)
        return self._unread[tensor.name]
