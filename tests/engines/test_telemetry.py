"""OpenVINO reports nothing to anybody, unless the program around it imported it before."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = """\
class Telemetry:
    def __init__(self, **options):
        pass

    def send_event(self, *event):
        print("it reports")
"""


@pytest.mark.parametrize(
    ("before", "reports"),
    [("", False), ("import openvino_telemetry", True), ("import openvino", True)],
)
def test_openvino_is_imported_without_its_telemetry(before: str, reports: bool, tmp_path: Path) -> None:
    """A package stands in for Intel's, so that the tests report nothing either."""
    backend = tmp_path / "openvino_telemetry" / "backend"
    backend.mkdir(parents=True)
    (backend.parent / "__init__.py").write_text(PACKAGE)
    (backend / "__init__.py").write_text("backend_ga4 = None\n")
    code = f"""{before}
import importlib.util
import sys
from toolchain.engines.openvino.device import core
assert "CPU" in core().available_devices
assert "openvino.tools.ovc" in sys.modules, "it has another place for its telemetry"
assert importlib.util.find_spec("openvino_telemetry"), "the package is hidden for good"
"""
    given = {name: value for name, value in os.environ.items() if name != "CI"}
    given["PYTHONPATH"] = os.pathsep.join([str(tmp_path), given.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    done = subprocess.run([sys.executable, "-c", code], env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert ("it reports" in done.stdout) == reports
