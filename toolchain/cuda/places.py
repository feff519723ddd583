"""Where the tensors of an engine lie in a GPU's memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from toolchain.cuda.memory import DeviceBuffer, DeviceMemory
from toolchain.errors import EngineError
from toolchain.signature import GraphSpec, TensorSpec


class Places:
    """Finds a buffer for every tensor of an engine, whose launches keep the addresses.

    Outputs that nobody reads get buffers of their own: a captured graph wants an address for each.
    """

    def __init__(self, spec: GraphSpec, folder: Path, memory: DeviceMemory, alignment: int = 1) -> None:
        """`alignment` in bytes is asked of every address. `folder` is named in errors."""
        self._spec, self._folder, self._memory, self._alignment = spec, folder, memory, alignment
        self._unread: dict[str, DeviceBuffer] = {}

    def of(self, buffers: Mapping[str, DeviceBuffer]) -> dict[str, DeviceBuffer]:
        """A buffer by the name of each tensor. Raises EngineError for one that is missing or does not fit."""
        inputs = {t.name: self._fitting(t, buffers.get(t.name)) for t in self._spec.inputs}
        outputs = {t.name: self._fitting(t, buffers.get(t.name) or self._nowhere(t)) for t in self._spec.outputs}
        return inputs | outputs

    def free(self) -> None:
        self._memory.free(*self._unread.values())
        self._unread = {}

    def _fitting(self, tensor: TensorSpec, buffer: DeviceBuffer | None) -> DeviceBuffer:
        expected = f"{tensor.name}: {tensor.dtype} {list(tensor.shape)}"
        if self._alignment > 1:
            expected += f", at a multiple of {self._alignment} bytes"
        if buffer is None:
            raise EngineError("a buffer is missing", where=self._folder, expected=expected)
        fits = str(buffer.dtype) == tensor.dtype and buffer.shape == tensor.shape
        if not fits or buffer.address % self._alignment:
            got = f"{buffer.dtype} {list(buffer.shape)} at {buffer.address:#x}"
            raise EngineError("a buffer does not fit", where=self._folder, expected=expected, got=got)
        return buffer

    def _nowhere(self, tensor: TensorSpec) -> DeviceBuffer:
        if tensor.name not in self._unread:
            self._unread[tensor.name] = self._memory.zeros(tensor.shape, tensor.dtype)
        return self._unread[tensor.name]
