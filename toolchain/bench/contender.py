"""The process of a contender, seen from the benchmark."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from toolchain.bench.workload import Workload
from toolchain.errors import DiffbuildError


class Contender:
    """One line of JSON goes in for each picture and one comes out.

    start    milliseconds of the cold start by part, from the process's start to its first picture
    gpu_mb   what came onto the GPU with it, until then; None for one that runs on the CPU
    picture  the PNG of that first picture
    """

    def __init__(self, name: str, bundle: Path, model: Path | None, work: Workload, scratch: Path) -> None:
        """Starts it and waits for its first picture. DiffbuildError with its output when it fails."""
        self.name = name
        self.picture = scratch / f"{name}.png"
        self._errors = (scratch / f"{name}.log").open("w+")
        self._started = time.time()
        command = [sys.executable, "-m", "toolchain.bench.worker", name, str(bundle), str(model), str(self.picture)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True
        )
        answer = self._ask(vars(work))
        began = answer.pop("began")
        self.gpu_mb: float | None = answer.pop("gpu_mb")
        self.start: dict[str, float] = {"process_ms": (began - self._started) * 1e3, **answer}

    def draw(self, work: Workload) -> dict[str, Any]:
        """Draws the pictures of a workload; milliseconds by stage."""
        return self._ask(vars(work))

    def finish(self) -> dict[str, Any]:
        """What is only known at the end: peak memory."""
        return {**self._ask(None), "gpu_mb": self.gpu_mb}

    def close(self) -> None:
        """Ends the process."""
        self._process.kill()
        self._process.wait()
        self._errors.close()

    def _ask(self, message: dict[str, Any] | None) -> dict[str, Any]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            self._process.wait()
            self._errors.seek(0)
            output = [text for text in self._errors.read().splitlines() if text.strip()]
            raise DiffbuildError(
                f"{self.name} failed while it was measured",
                where=f"exit code {self._process.returncode}",
                got="\n    ".join(output[-8:]) or "it printed nothing",
            )
        answer: dict[str, Any] = json.loads(line)
        return answer
