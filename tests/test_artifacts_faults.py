"""Runs tests/artifacts_faults.py in a process of its own.

It forks some 1,500 times, and a fork of this process, with all that other tests have imported, takes 20 times as long.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).with_name("artifacts_faults.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_every_fault_leaves_the_store_right(tmp_path: Path) -> None:
    arguments = ["-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--basetemp", str(tmp_path / "faults"), str(FAULTS)]
    done = subprocess.run([sys.executable, "-m", "pytest", *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    tests = FAULTS.read_text().count("\ndef test_")
    assert f"{tests} passed" in done.stdout
