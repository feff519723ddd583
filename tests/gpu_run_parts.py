"""Parts of a run on a GPU that end in every way there is: for tests/test_gpu_run.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from benchmarks.gpu_run.record import Record


def good(record: Record) -> None:
    record("answer", 42)


def one_stage_fails(record: Record) -> None:
    record.stage("bad", lambda: 1 // 0)
    record.stage("good", lambda: {"answer": 42})


def raises(record: Record) -> None:
    record("first", 1)
    raise RuntimeError("nobody expected this")


def killed(record: Record) -> None:
    record("first", 1)
    record.stage("second", lambda: os.kill(os.getpid(), signal.SIGKILL))


def hangs(record: Record) -> None:
    """With a child, and deaf to SIGTERM, as what waits in a driver is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, "-c", "import signal, time; signal.sigwait([signal.SIGUSR1])"])
    record("pids", [os.getpid(), child.pid])
    record.stage("second", lambda: time.sleep(600))
