"""Refitting: weights come back into the engine of a stripped plan."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from tensorrt._engine import ICudaEngine
from tensorrt._graph import DTYPES, content_of, embed, nbytes_of, read_memory
from tensorrt._interfaces import Buffer, ILogger, Reporter, Weights
from tensorrt._network import Loader, ParserError
from tensorrt._rules import Native, at_least, violate


class Refitter(Native):
    """Weights are staged by `set_named_weights` and go into the engine with `refit_cuda_engine`."""

    def __init__(self, engine: ICudaEngine, logger: ILogger) -> None:
        if not engine.refittable:
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self._engine = engine
        self._report = Reporter(logger)
        self._staged: dict[str, bytes] = {}
        self._max_threads = 1

    @property
    def max_threads(self) -> int:
        return self._max_threads

    @max_threads.setter
    def max_threads(self, value: int) -> None:
        self._max_threads = int(value)

    def get_all_weights(self) -> list[str]:
        return [t.name for t in self._engine._model.graph.initializer]

    def get_missing_weights(self) -> list[str]:
        return [name for name in self._engine._missing() if name not in self._staged]

    def get_weights_prototype(self, weights_name: str) -> Weights:
        tensor = self._tensor(weights_name)
        dtype = DTYPES[tensor.data_type]
        return Weights(dtype, 0, int(nbytes_of(tensor) / dtype.itemsize))

    def set_named_weights(self, name: str, weights: Weights) -> bool:
        tensor = self._tensor(name)
        if tensor is None or weights.dtype is not DTYPES[tensor.data_type] or weights.nbytes != nbytes_of(tensor):
            self._report.error(f"Refitter::setNamedWeights: the weights do not fit {name}")
            return False
        self._stage(name, read_memory(weights._address(), weights.nbytes, f"the weights {name}"))
        return True

    def _tensor(self, name: str) -> Any:
        return next((t for t in self._engine._model.graph.initializer if t.name == name), None)

    def _stage(self, name: str, content: bytes) -> None:
        wanted = self._engine._header["weights"].get(name)
        identical = self._engine._header["refit"] == "REFIT_IDENTICAL"
        if identical and wanted and hashlib.sha256(content).hexdigest() != wanted["sha256"]:
            violate(f"REFIT_IDENTICAL with other weights than at build time: {name}")
        self._staged[name] = content

    def refit_cuda_engine(self) -> bool:
        if self.get_missing_weights():
            self._report.error(f"Refitter::refitCudaEngine: missing weights {self.get_missing_weights()[:3]}")
            return False
        for name, content in self._staged.items():
            embed(self._tensor(name), content)
        self._engine._executable = None
        return True

    def refit_cuda_engine_async(self, stream_handle: int) -> bool:
        return self.refit_cuda_engine()


if at_least(11, 1):

    def release_refit_resources(self: Refitter) -> bool:
        return True

    Refitter.release_refit_resources = release_refit_resources  # type: ignore[attr-defined]


class OnnxParserRefitter(Native):
    """Stages the weights of an ONNX model in a refitter."""

    def __init__(self, refitter: Refitter, logger: ILogger) -> None:
        self._refitter = refitter
        self._loader = Loader(logger)

    def refit_from_file(self, model: str) -> bool:
        return self._loader.load_file(model) and self.refit_model_proto()

    def refit_from_bytes(self, model: Buffer, path: str | None = None) -> bool:
        return self._loader.load(model, Path(path).parent if path else None) and self.refit_model_proto()

    def load_model_proto(self, model: Buffer, path: str | None = None) -> bool:
        return self._loader.load(model, Path(path).parent if path else None)

    def load_initializer(self, name: str, data: int, size: int) -> bool:
        return self._loader.attach(name, int(data), int(size))

    def refit_model_proto(self) -> bool:
        loader = self._loader
        if not loader.resolve():
            return False
        for tensor in loader.model.graph.initializer:
            theirs = self._refitter._tensor(tensor.name)
            if theirs is None:
                continue  # a constant that the builder folded
            held = tensor.name in loader.initializers.held
            content = loader.initializers.read(tensor.name) if held else content_of(tensor)
            if theirs.data_type != tensor.data_type or len(content) != nbytes_of(theirs):
                return loader.fail(f"the weights of {tensor.name} do not fit the engine", "REFIT_FAILED")
            self._refitter._stage(tensor.name, content)
        return True

    @property
    def num_errors(self) -> int:
        return len(self._loader.errors)

    def get_error(self, index: int) -> ParserError:
        return self._loader.errors[index]

    def clear_errors(self) -> None:
        self._loader.errors.clear()
