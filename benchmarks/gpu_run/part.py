"""The process of one part: `python -m benchmarks.gpu_run.part MODULE:FUNCTION OUTPUT PARENT`."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import signal
import sys
from pathlib import Path

from benchmarks.gpu_run.record import Record

PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """A process whose parent is killed outright must not hold the GPU any longer."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    name, output, parent = sys.argv[1:]
    end_with_parent()
    if os.getppid() != int(parent):
        sys.exit("the runner is gone")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    module, function = name.split(":")
    path = Path(output)
    getattr(importlib.import_module(module), function)(Record(path, path.stem))


if __name__ == "__main__":
    main()
