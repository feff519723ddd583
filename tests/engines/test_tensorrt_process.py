"""The end of the builder's process: what is made of a crash, a kill, an exit code and its last words."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from tests.build_graph import options, write_network
from tests.pretend import pretended
from toolchain.engines.tensorrt import builder_process
from toolchain.engines.tensorrt.builder_process import run_builder
from toolchain.errors import EngineError

INITIALISATION = "[W] CUDA initialization failure with error: {}. Please check your CUDA installation\n"


@pytest.fixture(autouse=True)
def _builder_that_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(builder_process, "MODULE", "tests.ending_builder")


def ended(ends: int, stderr: str = "", stdout: str = "", **given: Any) -> dict[str, Any]:
    job = {
        "graph": "/g/graph.onnx",
        "options": vars(options(**given)),
        "ends": ends,
        "stderr": stderr,
        "stdout": stdout,
    }
    return run_builder(job, lambda phase, share: None)


def failed(*args: Any, **given: Any) -> EngineError:
    with pytest.raises(EngineError) as error:
        ended(*args, **given)
    return error.value


def test_a_report_comes_back() -> None:
    assert ended(0, "noise", '{"phase": "p", "share": 0.5}\n{"done": {"format": 1}}\n') == {"format": 1}


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT", "SIGBUS"])
def test_a_crash(name: str) -> None:
    error = failed(-getattr(signal, name), "[I] one\n\n[I] two\n", builder_optimization_level=4)
    assert error.what == "TensorRT's builder crashed"
    assert error.got == f"{name}\n    [I] one\n    [I] two"
    assert error.where == "/g/graph.onnx"
    assert "tensorrt.builder_optimization_level to another value (now 4)" in str(error.hint)


def test_a_crash_in_the_middle_of_a_line() -> None:
    assert failed(-signal.SIGSEGV, "", '{"phase": "p", "sha').what == "TensorRT's builder crashed"


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM"])
def test_a_kill_that_nobody_explains(name: str) -> None:
    error = failed(-getattr(signal, name))
    assert (error.what, error.got) == ("TensorRT's builder was killed", name)
    assert "dmesg" in str(error.hint)


def test_the_kernels_oom_killer_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter([7, 8])
    monkeypatch.setattr(builder_process, "_oom_kills", lambda: next(counts))
    error = failed(-signal.SIGKILL)
    assert "out of host memory (its OOM killer)" in str(error.got)
    assert "free host memory" in str(error.hint)


def test_the_kernel_counts_its_oom_kills() -> None:
    lines = Path("/proc/vmstat").read_text().splitlines()
    assert f"oom_kill {builder_process._oom_kills()}" in lines


def test_an_exit_code_without_a_word() -> None:
    error = failed(3, "Traceback (most recent call last):\nImportError: libnvinfer.so.11\n")
    assert error.what == "TensorRT's builder ended with exit code 3"
    assert str(error.got).endswith("ImportError: libnvinfer.so.11")


def test_success_needs_a_report() -> None:
    assert failed(0).what == "TensorRT's builder ended with exit code 0"


CUDA = {
    "35": ("the NVIDIA driver is too old for this TensorRT's CUDA", "install a newer NVIDIA driver"),
    "222": ("the NVIDIA driver is too old for this TensorRT's CUDA", "install a newer NVIDIA driver"),
    "100": ("there is no CUDA device", "diffbuild doctor"),
    "803": ("the NVIDIA driver and its libraries are of two versions", "restart the machine"),
    "2": ("out of GPU memory", "(now 3) or set tensorrt.workspace_mb (now 0;"),
    "999": ("CUDA does not start (error 999)", "diffbuild doctor"),
}
START = '{"error": {"what": "TensorRT cannot start its builder", "hint": null, "got": null}}\n'


@pytest.mark.parametrize("number", CUDA)
def test_cuda_that_does_not_start(number: str) -> None:
    error = failed(1, INITIALISATION.format(number), START)
    cause, hint = CUDA[number]
    assert error.what == "TensorRT cannot start its builder"
    assert str(error.got).splitlines()[0] == cause
    assert hint in str(error.hint)


NONE = '{"error": {"what": "TensorRT could not build the engine", "hint": null, "got": null}}\n'
NODES = [
    ("Could not find any implementation for node {ForeignNode[a...b/MatMul]}.)", "{ForeignNode[a...b/MatMul]}"),
    ("Error Code 10: Internal Error (Could not find any implementation for node node_conv2d_3.)", "node_conv2d_3"),
    ("could not find any implementation for node /down.0/Conv, try increasing the workspace", "/down.0/Conv"),
]


@pytest.mark.parametrize(("line", "node"), NODES)
def test_a_node_without_a_kernel(line: str, node: str) -> None:
    error = failed(1, f"[E] {line}\n", NONE)
    assert str(error.got).splitlines()[0] == f"TensorRT has no kernel for node {node}"
    assert "another value (now 3)" in str(error.hint)


@pytest.mark.parametrize(("line", "node"), NODES)
def test_a_node_without_a_kernel_for_want_of_memory(line: str, node: str) -> None:
    said = f"[E] Error Code 2: OutOfMemory (Requested size was 8589934592 bytes.)\n[E] {line}\n"
    error = failed(1, said, NONE, workspace_mb=512)
    assert str(error.got).splitlines()[0] == f"out of GPU memory at node {node}"
    assert "workspace_mb (now 512;" in str(error.hint)


def test_a_tactic_left_out_for_want_of_memory_is_no_cause() -> None:
    said = "[W] Skipping tactic 3 due to insufficient memory on requested size of 8589934592\n[E] something else\n"
    assert "TensorRT does not say why" in str(failed(1, said, NONE).got)


def test_a_reason_that_the_builder_gives_goes_before_its_log() -> None:
    """TensorRT logs allocations that failed and that it did without."""
    given = '{"error": {"what": "w", "hint": "h {x}", "got": "g", "expected": "e", "where": "here"}}\n'
    error = failed(1, "[W] Requested amount of GPU memory could not be allocated\n", given)
    assert (error.what, error.hint, error.expected, error.where) == ("w", "h {x}", "e", "here")
    assert str(error.got).splitlines()[0] == "g"


def test_only_the_last_lines_are_shown() -> None:
    error = failed(-signal.SIGSEGV, "".join(f"line {i}\n" for i in range(200_000)))
    lines = str(error.got).splitlines()
    assert lines[1:] == [f"    line {i}" for i in range(200_000 - builder_process.LOG_LINES, 200_000)]


def test_warnings_are_passed_on(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        ended(0, "", '{"warning": "100 % of it"}\n{"done": {}}\n')
    assert caplog.messages == ["100 % of it"]


# --- the parent's own end ---------------------------------------------------------------------------------------------

PARENT = """
import sys
from pathlib import Path
from tests.build_graph import options
from toolchain.engines.tensorrt import builder_process
from toolchain.engines.tensorrt.build import TensorRtBuilder

builder_process.GRACE_S = 0.5
folder = Path(sys.argv[1])
(folder / "engine").mkdir()
tell = lambda phase, share: print("building", flush=True)
weights = {"weights": folder / "weights.safetensors"}
TensorRtBuilder().build(folder / "graph.onnx", weights, folder / "engine", options(), tell)
"""


def alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has waited for yet does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def children_of(pid: int) -> list[int]:
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # it is gone by now
        if int(fields[1]) == pid:
            found.append(int(stat.parent.name))
    return found


@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_no_builder_outlives_its_parent(name: str, tmp_path: Path) -> None:
    """Of a builder that hangs and is deaf to SIGINT."""
    write_network(tmp_path)
    with pretended(FAKE_TENSORRT_FAIL="hang", DIFFBUILD_CACHE=str(tmp_path / "cache")):
        root = Path(__file__).parents[2]
        parent = subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PARENT), str(tmp_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=root,
        )
    assert parent.stdout is not None
    with parent.stdout:
        assert parent.stdout.readline() == b"building\n"
        (builder,) = children_of(parent.pid)
        parent.send_signal(getattr(signal, name))
        parent.wait(30)
        deadline = time.monotonic() + 10
        while alive(builder) and time.monotonic() < deadline:
            time.sleep(0.05)
        assert not alive(builder)


def test_the_builder_goes_when_its_parent_went_first(tmp_path: Path) -> None:
    """Between the fork and the request to die with the parent."""
    with pretended():
        code = "import os, toolchain.engines.tensorrt.build_plan as b; b._die_with(os.getppid() + 1); print('alive')"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ)
    assert (done.returncode, done.stdout) == (1, "")
