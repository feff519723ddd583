"""tests/gpu on the GPU, test by test: an error on a GPU spoils whatever its process does next.

After a test that fails, crashes or hangs, a new process goes on with the tests behind it. `python -m
benchmarks.gpu_run.gpu_tests FILE [TEST ...]` is that process: it leaves out the tests named, ends after the first
failure, and says in one line of JSON what happens to each.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.gpu_run.part import end_with_parent
from benchmarks.gpu_run.record import ROOT, Record

FILES = tuple(f"tests/gpu/test_gpu_{name}.py" for name in ("memory", "onnxruntime", "tensorrt"))
"""What needs nothing but cuda-python comes first."""
TEST_S = 60.0
"""What a test may take, the start of its process included."""
WHY = 2000  # characters of a failure


def measure(record: Record) -> None:
    measure_files(record, FILES, TEST_S)


def measure_files(record: Record, files: tuple[str, ...], test_s: float) -> None:
    for file in files:
        name, done = Path(file).stem, {}
        while True:
            before = len(done)
            for test, outcome in _process(file, [*done], test_s):
                done[test] = outcome
                record(name, done)
            if len(done) == before:  # nothing is left, or nothing can be collected
                break
        bad = [test for test, found in done.items() if found["outcome"] not in ("passed", "skipped")]
        counts = dict(Counter(found["outcome"] for found in done.values()))
        why = "no test ran; the log says why" if not done else ", ".join(bad)
        record(f"{name}.outcomes", counts | ({"error": why} if why else {}))


def _process(file: str, without: list[str], test_s: float) -> Iterator[tuple[str, dict[str, Any]]]:
    """(test, outcome) as they come, until one fails or the last has run."""
    command = [sys.executable, "-m", __spec__.name, file, *without]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    said: queue.Queue[str] = queue.Queue()
    threading.Thread(target=_pass_on, args=(process.stdout, said), daemon=True).start()
    running = None
    while True:
        try:
            line = said.get(timeout=test_s)
        except queue.Empty:
            process.kill()
            process.wait()
            if running is not None:
                yield running, {"outcome": "hung", "seconds": test_s}
            return
        if not line:
            break
        event = json.loads(line)
        test = event.pop("test")
        running = None if event else test
        if event:
            yield test, event
    code = process.wait()
    if running is not None:
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        yield running, {"outcome": "crashed", "why": how}


def _pass_on(lines: Any, said: queue.Queue[str]) -> None:
    for line in lines:
        said.put(line)
    said.put("")


class _Teller:
    """A plugin of pytest: the name of a test when it begins, and how it ended."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._ended: dict[str, dict[str, Any]] = {}

    def _tell(self, test: str, **event: Any) -> None:
        print(json.dumps({"test": test, **event}), file=self._out, flush=True)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._tell(nodeid)

    def pytest_runtest_logreport(self, report: Any) -> None:
        found = self._ended.setdefault(report.nodeid, {"outcome": "passed", "seconds": 0.0})
        found["seconds"] = round(found["seconds"] + report.duration, 3)
        if report.outcome == "skipped":
            found |= {"outcome": "skipped", "why": str(report.longrepr[2])}
        elif report.outcome == "failed":
            found |= {"outcome": "failed", "when": report.when, "why": report.longreprtext[-WHY:]}

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self._tell(nodeid, **self._ended.pop(nodeid))


def main() -> None:
    import pytest

    end_with_parent()
    file, *without = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what pytest prints is no answer
    deselected = [option for test in without for option in ("--deselect", test)]
    options = ["-x", "-q", "-p", "no:cacheprovider", "--rootdir", str(ROOT)]
    sys.exit(pytest.main([file, *options, *deselected], plugins=[_Teller(answers)]))


if __name__ == "__main__":
    main()
