"""A plan that goes to its file as TensorRT makes it: a second copy of gigabytes of weights in memory is spared."""

from __future__ import annotations

import hashlib
from typing import IO, Any

from toolchain.errors import EngineError


def make_plan_file(trt: Any, file: IO[bytes]) -> Any:
    """A stream writer over an open file. What goes wrong is kept: the binding prints an exception and goes on, and
    TensorRT for RTX 1.7.1 says that the plan was built whatever its writer answers."""

    class PlanFile(trt.IStreamWriter):  # type: ignore[misc]
        """digest: sha256 of what was written so far."""

        def __init__(self) -> None:
            trt.IStreamWriter.__init__(self)
            self._sha256 = hashlib.sha256()
            self._error: Exception | None = None

        @property
        def digest(self) -> str:
            return self._sha256.hexdigest()

        def write(self, data: bytes) -> int:
            try:
                file.write(data)
            except Exception as error:
                self._error = error
                return 0
            self._sha256.update(data)
            return len(data)

        def require_written(self) -> None:
            """EngineError where the file takes no more; what else went wrong in a write is raised here."""
            try:
                file.flush()
            except OSError as error:
                self._error = self._error or error
            if isinstance(self._error, OSError):
                raise EngineError(
                    "the engine's plan cannot be written",
                    where=file.name,
                    got=self._error.strerror or self._error,
                    hint="free space where the store lies, or name another: --store",
                ) from self._error
            if self._error is not None:
                raise self._error

    return PlanFile()
